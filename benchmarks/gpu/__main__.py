"""Measure, or write the page; see :mod:`benchmarks.gpu`."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch

from benchmarks.gpu import docs, measure_case
from benchmarks.gpu.cases import CASES
from benchmarks.papers.docs import write_json
from zowrap.bench import measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("what", choices=("run", "docs"))
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights, on any machine")
    parser.add_argument("--case", nargs="+", default=[], help="only the cases whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=11, help="how often each row is timed")
    options = parser.parse_args()
    if options.what == "docs":
        docs.write_page()
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "no NVIDIA GPU was found; --tiny exercises every row without one\n")
    chosen = [c for c in CASES if not options.case or any(part in c.name for part in options.case)]
    if not chosen:
        parser.exit(2, f"no case has such a name; there are: {', '.join(c.name for c in CASES)}\n")
    rows: list[dict[str, Any]] = []
    for case in chosen:
        for record in measure_case.run(case.tiny() if options.tiny else case, options.rounds):
            rows.append(record)
            print(record["case"], "|", record["row"], "|", record.get("ratio", record.get("error")), flush=True)
            if not options.tiny:
                _keep(rows, options.rounds)


def _keep(rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the results so far, keeping rows of earlier runs, so that a run that stops half-way loses nothing."""
    machine = measure.describe_machine()
    path = docs.RESULTS / f"{re.sub('[^a-z0-9]+', '-', machine['gpu'].lower())}.json"
    new = {(r["case"], r["row"]) for r in rows}
    before = docs.read_result(path)["rows"] if path.exists() else []
    kept = [r for r in before if (r["case"], r["row"]) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"machine": machine, "rounds": rounds, "rows": [*kept, *rows]}, path)


if __name__ == "__main__":
    main()
