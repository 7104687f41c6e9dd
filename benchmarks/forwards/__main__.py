"""``python -m benchmarks.forwards``, see :mod:`benchmarks.forwards`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.forwards.methods import METHODS
from benchmarks.forwards.runs import TASKS, Bench
from benchmarks.forwards.search import OutOfTime, Search, finished
from zowrap.errors import ZOError

RUNS = Path(__file__).parents[1] / "results" / "forwards" / "runs.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forwards", description=str(__doc__))
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are missing")
    run.add_argument("tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}")
    run.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
    run.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    run.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    run.add_argument("--models-dir", type=Path, default=Path("../shared/models"))
    run.add_argument("--runs", type=Path, default=RUNS, help="the file of finished runs")
    run.add_argument("--engine", choices=("compiled", "eager"), help="default: compiled where possible")
    docs = commands.add_parser("docs", help="write docs/forwards.md from the finished runs")
    docs.add_argument("--runs", type=Path, default=RUNS)
    options = parser.parse_args()
    try:
        if options.command == "docs":
            from benchmarks.forwards.report import write

            write(finished(options.runs))
            return 0
        until = time.monotonic() + options.seconds
        for task in options.tasks:
            if task not in TASKS:
                raise ZOError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
            make = lambda name=task: Bench(name, options.data_dir, options.models_dir, options.engine)  # noqa: E731
            say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
            Search(task, finished(options.runs), make, until, say).make(options.methods)
    except OutOfTime:
        print("out of time: run it again to go on", file=sys.stderr)
    except ZOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
