"""Measure, or write the page; see :mod:`benchmarks.performance`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.papers.docs import write_json
from benchmarks.performance import docs, growth, operators, profile


def bench(*options: str) -> dict[str, Any]:
    """Run ``zowrap bench step``, and return its JSON."""
    command = [sys.executable, "-m", "zowrap.cli", "bench", "step", "--json", *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("what", choices=("step", "starts", "long", "profile", "growth", "operators", "docs"))
    parser.add_argument("--rounds", type=int, default=11, help="how often each row is timed")
    parser.add_argument("--rows", nargs="+", default=[], help="of `zowrap bench step`; default: all")
    options = parser.parse_args()
    if options.what == "docs":
        docs.write_page()
        return
    rounds = ["--rounds", str(options.rounds)]
    rows = [part for row in options.rows for part in ("--row", row)]
    middle = ("--arch", "opt-125m", "--batch", "8", "--seq", "64")
    if options.what == "step":
        result = bench(*middle, "--together", *rounds, *rows)
    elif options.what == "starts":
        result = bench(*middle, "--rounds", "1", *rows)  # each row in processes of its own; its time is not kept
        for row in result["rows"]:
            del row["seconds"], row["ratio"]
    elif options.what == "long":
        rows = rows or ["--row", "gaussian"]
        result = bench("--arch", "opt-125m", "--batch", "8", "--seq", "256", "--together", *rounds, *rows)
    else:
        result = {"growth": growth, "operators": operators, "profile": profile}[options.what].run(options.rounds)
    docs.RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(result, docs.RESULTS / f"{options.what}.json")


if __name__ == "__main__":
    main()
