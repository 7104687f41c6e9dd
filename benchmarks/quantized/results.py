"""Read and write the figures in ``benchmarks/results``, one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
CELLS, NOISE, FLOOR, MEMORY, SIXTEEN = (
    RESULTS / f"quantized{end}.json" for end in ("", "_noise", "_floor", "_memory", "_sixteen_bit")
)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a results file; empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    """Write the lines of a results file."""
    file.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n", encoding="utf-8")


def best_rate(lines: list[dict[str, Any]], form: str, task: str) -> float:
    """The learning rate with the best dev accuracy of seed 0 on TREC, the best dev loss in language modelling."""
    first = [line for line in lines if (line["form"], line["task"], line["seed"]) == (form, task, 0)]
    if task == "trec":
        return float(max(first, key=lambda line: line["dev_accuracy"] or 0.0)["lr"])
    return float(min(first, key=lambda line: math.inf if line["dev_loss"] is None else line["dev_loss"])["lr"])


def read_figures() -> list[list[dict[str, Any]]]:
    """Read all figures for the page, in the order of :func:`benchmarks.quantized.report.document`."""
    return [read_lines(file) for file in (CELLS, MEMORY, SIXTEEN, NOISE, FLOOR)]
