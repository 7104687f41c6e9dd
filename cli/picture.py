"""``loss.png`` from ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zowrap.storage.atomic import guard_write


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of steps and those of evaluations; a torn last line is left out."""
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    if not path.is_file():
        return steps, evaluations
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        (evaluations if "eval_loss" in value else steps).append(value)
    return steps, evaluations


def draw(path: Path, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> bool:
    """Draw the losses and the accuracy; False where matplotlib is missing or there is nothing to draw.

    Raises:
        ZOError: the disk is full.
    """
    known = [(s["step"], s["loss"]) for s in steps if s.get("loss") is not None]
    if not known:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at, losses = zip(*known, strict=True)
    axes.plot(at, losses, color="0.8", linewidth=0.8, label="loss of the batch")
    axes.plot(at, _smooth(losses), color="C0", label="smoothed")
    if evaluations:
        axes.plot(
            [e["step"] for e in evaluations],
            [e["eval_loss"] for e in evaluations],
            "o-",
            color="C1",
            label="evaluation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if any("eval_accuracy" in e for e in evaluations):
        right = axes.twinx()
        known_accuracy = [(e["step"], e["eval_accuracy"]) for e in evaluations if "eval_accuracy" in e]
        right.plot(*zip(*known_accuracy, strict=True), "s--", color="C2", markersize=4)
        right.set_ylabel("accuracy", color="C2")
    axes.legend(loc="upper right")
    beside = path.with_name("loss.tmp.png")
    with guard_write(path, beside):
        figure.savefig(beside, dpi=120)
        os.replace(beside, path)
    return True


def _smooth(values: Any, memory: float = 0.95) -> list[float]:
    """Exponential mean that starts unbiased."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(total / weight)
    return out
