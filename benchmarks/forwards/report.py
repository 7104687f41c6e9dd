"""Write docs/forwards.md and its figures from the finished runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.forwards.methods import METHODS
from benchmarks.forwards.runs import TASKS, Run
from benchmarks.forwards.search import SEEDS, Line, Search, final_loss
from benchmarks.papers.grid import CellFile

DOCS = Path(__file__).parents[2] / "docs"
BASE = "MeZO"
_COLOURS = ("#444444", "#999999", "#2a7fb8", "#c0392b", "#e67e22", "#1e8449", "#82c99a", "#8e44ad")


class Missing(Exception):
    """A run that a table needs is not in the file."""


def write(file: CellFile) -> None:
    """Write the page and a figure for each task that has finished runs."""
    parts = [_HEAD]
    for task in TASKS:
        found = {name: lines for name in METHODS if (lines := _lines(file, task, name))}
        if not found:
            parts.append(f"## {task}\n\nNot run yet.\n")
            continue
        missing = [name for name in METHODS if name not in found]
        parts += [f"## {task}\n", *_table(found)]
        if missing:
            parts.append(f"\nNot run yet: {', '.join(missing)}.\n")
        parts.append(f"\n![dev loss and accuracy against forwards](forwards/{task}.png)\n")
        _draw(task, found, DOCS / "forwards" / f"{task}.png")
    (DOCS / "forwards.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _lines(file: CellFile, task: str, name: str) -> list[Line]:
    """The runs of a method at its best setting, one for each seed; none if any is missing."""

    def line_of(run: Run) -> Line:
        if run.key() not in file.lines:
            raise Missing
        return file.lines[run.key()]

    def refuse() -> Any:
        raise Missing

    try:
        best = Search(task, file, refuse, math.inf).best(name, line_of)
        return [line_of(replace(best, seed=seed)) for seed in SEEDS]
    except Missing:
        return []


def point_at(line: Line, loss: float) -> dict[str, Any] | None:
    """The first evaluation whose dev loss was at most ``loss``; None where there is none."""
    return next((p for p in line["curve"] if p["loss"] is not None and p["loss"] <= loss), None)


def _table(found: dict[str, list[Line]]) -> list[str]:
    base = found.get(BASE)
    target = None if base is None else statistics.fmean(final_loss(line) for line in base)
    reach = "forwards to MeZO's last loss" + ("" if target is None else f", {target:.3f}")
    first = next(iter(found.values()))[0]["curve"][0]
    rows = [
        f"Untuned: dev loss {first['loss']:.3f}{_accuracy(first['accuracy'])}.\n",
        f"| method | η, batch | last dev loss | lowest, after forwards | last dev accuracy | test accuracy | {reach} | "
        "dev accuracy there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, lines in found.items():
        lows = [min((p for p in line["curve"] if p["loss"] is not None), key=lambda p: p["loss"]) for line in lines]
        reached = [] if target is None else [point_at(line, target) for line in lines]
        cells = [
            name,
            f"{lines[0]['chosen_lr']:.1e}, {lines[0]['batch_size']}",
            _spread([final_loss(line) for line in lines]),
            f"{_spread([p['loss'] for p in lows])}, {_range([p['forwards'] for p in lows])}",
            _spread([line["curve"][-1]["accuracy"] for line in lines]),
            _spread([line["test"]["accuracy"] for line in lines]),
            _range([None if point is None else point["forwards"] for point in reached]) if reached else "",
            _spread([point["accuracy"] for point in reached if point is not None]),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    if target is not None and (ratios := _ratios(found, target)):
        rows.append(f"\nForwards of {BASE} for each of these methods' to its last dev loss: {ratios}.")
    return rows


def _ratios(found: dict[str, list[Line]], target: float) -> str:
    """By how much fewer forwards other methods reach MeZO's last loss: the least and the most of the seeds."""
    whole = statistics.fmean(line["curve"][-1]["forwards"] for line in found[BASE])
    parts = []
    for name, lines in found.items():
        points = [point for line in lines if (point := point_at(line, target)) is not None]
        if name != BASE and len(points) == len(lines):
            ratios = sorted(whole / point["forwards"] for point in points)
            parts.append(f"{name} {ratios[0]:.0f} to {ratios[-1]:.0f}")
    return "; ".join(parts)


def _accuracy(value: float | None) -> str:
    return "" if value is None else f", accuracy {value:.3f}"


def _spread(given: Sequence[float | None]) -> str:
    """Mean and half the range over the seeds."""
    values = [value for value in given if value is not None]
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "diverges"
    return f"{statistics.fmean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def _range(values: Sequence[float | None]) -> str:
    shown = ["never" if value is None else f"{value:.0f}" for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _draw(task: str, found: dict[str, list[Line]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for colour, (name, lines) in zip(_COLOURS, found.items(), strict=False):
        for line in lines:
            points = [p for p in line["curve"] if p["loss"] is not None and p["forwards"] > 0]
            for axis, value in zip(axes, ("loss", "accuracy"), strict=True):
                shown = [p for p in points if p[value] is not None]
                label = name if line is lines[0] else None
                axis.plot([p["forwards"] for p in shown], [p[value] for p in shown], color=colour, lw=1, label=label)
    for axis, title in zip(axes, ("dev loss", "dev accuracy"), strict=True):
        axis.set(xscale="log", xlabel="plain forwards of 16 examples", title=f"{task}: {title}")
    axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_HEAD = """# Forward passes, measured

`python -m benchmarks.forwards run TASK …` makes the runs (resumable; they are lines of
`benchmarks/results/forwards/runs.jsonl`), `python -m benchmarks.forwards docs` this page. Every method tunes the same
model for the same task from the same start, on the same rows: 256 dev rows held out of the training file (Gemma: 128)
choose η (a grid of half decades on seed 0, which grows where its best value is at an end; MeZO's batch of 4 or 16
examples as well) by the loss at the end of the budget, and up to 500 test rows (Gemma: 256) report. Means and half
ranges are over three seeds. η is constant; that of residual credit falls to 0 within the budget, which is its default.
MiniLM compares texts with label names; the story model learns the sentences themselves; Gemma 3 270M scores words for
the labels after a prompt.

A forward is one of 16 examples. A step of MeZO costs two, of residual credit what `inspect` counts in operations, its
checks included, and a backward pass is counted as two forwards (of the last block alone, as its share of them).
`residual, auto` has no grid: its η is `--lr auto`'s, and the forwards for that are counted; `a tenth` is a run that was
planned for a tenth of the forwards. Backpropagation has the memory of all activations, and stands here as what the
forwards would have bought with it. Dev rows are evaluated at 3, 6, 12, 24, 48, 96, 192 and 400 forwards, so "forwards
to" are upper bounds.
"""
