"""Run an experiment with ``python -m benchmarks.papers E1 [--quick] [--out DIR] …``, and write its JSON and figure.

``all`` runs every numbered experiment with its defaults; ``docs`` makes docs/papers.md from the results kept in
benchmarks/results/papers. A mistake in the options ends with exit code 2 and one sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.papers import docs, list_experiments, load_experiment
from zowrap.errors import ZOError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in list_experiments():
        module = load_experiment(name)
        command = commands.add_parser(name, help=module.TITLE, description=module.TITLE)
        _add_common(command)
        module.add_arguments(command)
    _add_common(commands.add_parser("all", help="every numbered experiment, with its defaults"))
    commands.add_parser("docs", help="docs/papers.md and its figures from the kept results")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small version that shows the machinery, not the result")
    parser.add_argument("--out", type=Path, default=Path("papers-out"), help="folder for JSON and figure")


def run_one(name: str, options: argparse.Namespace) -> None:
    """Run an experiment; write ``<out>/<name>.json``, ``.svg`` and ``.md`` (its section of the documentation)."""
    module = load_experiment(name)
    stem = list_experiments()[name]
    start = time.perf_counter()
    result = module.run(options)
    options.out.mkdir(parents=True, exist_ok=True)
    docs.write_json(result, options.out / f"{stem}.json")
    # Make the section from the JSON as it reads back, so that the report shows what is kept.
    kept = json.loads((options.out / f"{stem}.json").read_text(encoding="utf-8"))
    module.plot(kept, options.out / f"{stem}.svg")
    section = module.report(kept)
    (options.out / f"{stem}.md").write_text(section, encoding="utf-8")
    print(section)
    print(f"{name}: {time.perf_counter() - start:.0f} s, written to {options.out}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code: 0 on success, 2 for wrong options."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "docs":
            docs.write_page()
        elif options.command == "all":
            common = [*(["--quick"] if options.quick else []), "--out", str(options.out)]
            for name in list_experiments():
                if name != "llm":
                    run_one(name, parser.parse_args([name, *common]))
        else:
            run_one(options.command, options)
    except ZOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
