"""Share code between the experiments: seeds, grids of runs, claims and their verdict, tables, figures."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.papers.cells import Cells, Objective
from zowrap.errors import ZOError
from zowrap.rules import Rule

SEEDS = (0, 1, 2, 3, 4)
QUICK_SEEDS = (0, 1)


class Claim(NamedTuple):
    """One line of an experiment's verdict: the expected and the obtained value, and whether they agree."""

    what: str
    expected: str
    obtained: str
    holds: bool


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of the runs; by default 0 1 2 3 4")


def chosen_seeds(options: argparse.Namespace) -> list[int]:
    """The seeds asked for; fewer by default with ``--quick``.

    Raises:
        ZOError: a seed is negative or given twice.
    """
    seeds = list(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ZOError(f"--seeds must be different whole numbers from 0, got {' '.join(map(str, seeds))}")
    return seeds


def chosen_steps(asked: int | None, default: int, multiple: int = 1) -> int:
    """The number of steps asked for, or the default.

    Raises:
        ZOError: not a positive multiple of ``multiple``, the distance between two records.
    """
    steps = default if asked is None else asked
    if steps < 1 or steps % multiple:
        raise ZOError(f"--steps must be a positive multiple of {multiple}, got {steps}")
    return steps


def half_decades(low: float, high: float, steps: int = 2) -> list[float]:
    """``low`` to ``high`` in ``steps`` equal factors per decade, to three digits."""
    count = round(steps * math.log10(high / low))
    return [float(f"{low * 10 ** (i / steps):.3g}") for i in range(count + 1)]


def grid(
    objective: Objective, rule: Rule, *, lrs: Sequence[float], starts: Tensor, seeds: Sequence[int], **options: Any
) -> Cells:
    """Cells for every learning rate (slowest) and seed (fastest); ``starts`` ``[seeds, d]``."""
    return Cells(
        objective,
        rule,
        start=starts.repeat(len(lrs), 1),
        lr=[lr for lr in lrs for _ in seeds],
        seeds=[seed for _ in lrs for seed in seeds],
        **options,
    )


def final_ratios(cells: Cells, lrs: Sequence[float], steps: int) -> list[list[float | None]]:
    """f(θ_steps) / f(θ_0) per learning rate and seed; None if a loss was not finite."""
    before = cells.values()
    cells.advance(steps)
    ratios = torch.where(cells.skipped > 0, torch.nan, cells.values() / before).reshape(len(lrs), -1)
    return [[finite(value) for value in row] for row in ratios.tolist()]


def finite(value: float) -> float | None:
    """The number to seven digits, or None: JSON has no infinity."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def mean(values: Sequence[float | None]) -> float:
    """The mean over runs; infinite if one of them diverged."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else math.inf


def best(rows: Sequence[Sequence[float | None]]) -> int:
    """Index of the row with the smallest mean."""
    return min(range(len(rows)), key=lambda i: mean(rows[i]))


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """``0.0374 ± 0.0021``: mean and standard deviation over seeds; ``diverged`` where a run did."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "diverged"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{mean(known):.{digits}g} ± {deviation:.2g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def section(result: Mapping[str, Any], title: str, claims: Sequence[Claim], body: str) -> str:
    """One experiment's part of the page: settings, claims with verdict, then its tables and remarks.

    ``result`` holds ``name``, ``quick``, ``settings``, ``versions`` and ``seconds``.
    """
    quick = " --quick" if result["quick"] else ""
    held = sum(claim.holds for claim in claims)
    verdict = "as expected" if held == len(claims) else f"{held} of {len(claims)} as expected"
    settings = "\n".join(f"- {name}: {value}" for name, value in result["settings"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    compared = table(
        ["", "expected", "obtained", "holds"],
        [[c.what, c.expected, c.obtained, "yes" if c.holds else "no"] for c in claims],
    )
    return (
        f"## {result['name']}: {title}\n\n`python -m benchmarks.papers {result['name']}{quick}` "
        f"({result['seconds']:.0f} s, one thread; {versions})\n\n{settings}\n\n{compared}\n\n"
        f"**Verdict: {verdict}.** {body.strip()}\n"
    )


@contextmanager
def figure(
    path: Path, columns: int = 1, width: float = 6.0, height: float = 3.6, rows: int | None = None
) -> Iterator[Any]:
    """Axes of a new figure (an array of them for several columns), saved as an SVG that is the same every time.

    With ``rows`` the array is ``[rows, columns]``, and ``height`` is one row's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9}):
        size = (width * (1 if columns == 1 else 1.4), height * (rows or 1))
        drawing, axes = pyplot.subplots(rows or 1, columns, figsize=size, squeeze=rows is None)
        try:
            yield axes
            drawing.tight_layout()
            drawing.savefig(path, metadata={"Date": None})
        finally:
            pyplot.close(drawing)
