"""Write ``docs/papers.md``, with a section per experiment, from the committed JSON only: no number is typed by hand."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

from benchmarks.papers import list_experiments, load_experiment

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "papers"
PAGE = ROOT / "docs" / "papers.md"
FIGURES = ROOT / "docs" / "papers"

HEAD = """# The papers' experiments

Each section is one command, `python -m benchmarks.papers E1`, and is generated from the JSON that it wrote
(`benchmarks/results/papers`); `python -m benchmarks.papers docs` makes this page from them. "Expected" values are from
an independent implementation or from the paper, "obtained" values are ours. ± is the standard deviation over seeds; the
best cell of a grid is chosen by the mean over seeds. E1 to E5 advance many runs at once with zowrap's own rules and
noise (`benchmarks/papers/cells.py`; a test checks that each run equals `zo_wrap`).
"""


def describe_versions() -> dict[str, str]:
    """The versions of zowrap, torch and Python, for a result."""
    import torch

    import zowrap

    return {"zowrap": zowrap.__version__, "torch": str(torch.__version__), "python": platform.python_version()}


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write a result as indented JSON, with lists of numbers on one line; a diverged run must be ``null``."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def read_committed() -> dict[str, dict[str, Any]]:
    """Read the kept results by experiment name, in order."""
    paths = {name: RESULTS / f"{module}.json" for name, module in list_experiments().items()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The whole page; each section's figure is ``papers/<module>.svg``."""
    sections = [HEAD]
    for name, result in results.items():
        stem = list_experiments()[name]
        sections.append(f"{load_experiment(name).report(result).rstrip()}\n\n![{name}](papers/{stem}.svg)\n")
    return "\n".join(sections)


def write_page() -> None:
    """Write the page and its figures from the kept results."""
    results = read_committed()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        load_experiment(name).plot(result, FIGURES / f"{list_experiments()[name]}.svg")
    PAGE.write_text(page(results), encoding="utf-8")
