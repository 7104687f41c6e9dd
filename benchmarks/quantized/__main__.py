"""Run the measurements of :mod:`benchmarks.quantized`, or write their page."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.quantized
from benchmarks.quantized import cells, code_noise, memory, report, sixteen_bit
from benchmarks.quantized.forms import FORMS, SEEDS
from benchmarks.quantized.results import FLOOR, MEMORY, SIXTEEN, read_figures, read_lines, write_lines


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(
        description=benchmarks.quantized.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "noise", "memory", "floor", "sixteen", "docs"))
    parser.add_argument("--lm", help="folder of a language model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rates", type=int, default=3, help="learning rates of each grid to try")
    parser.add_argument("--engine", choices=("compiled", "eager"), help="by default compiled")
    options = parser.parse_args()
    if options.what == "run":
        cells.run_missing(options.data_dir, options.lm, options.only, options.seeds, options.rates, options.engine)
    elif options.what == "noise":
        cells.measure_noise(options.data_dir, options.only)
    elif options.what == "memory":
        for name in options.only or FORMS:
            kept = [line for line in read_lines(MEMORY) if line["form"] != name]
            write_lines(MEMORY, [*kept, *memory.measure_form(name)])
    elif options.what == "floor":
        write_lines(FLOOR, code_noise.measure())
    elif options.what == "sixteen":
        write_lines(SIXTEEN, sixteen_bit.measure())
    else:
        report.write_docs(*read_figures())


if __name__ == "__main__":
    main()
