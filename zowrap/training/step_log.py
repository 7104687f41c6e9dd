"""The log of a run's steps: their mean losses, and how many were skipped."""

from __future__ import annotations

import math
from typing import Any


class StepLog:
    """Adds up the records of a run's steps.

    Attributes:
        skipped: steps skipped so far.
        skipped_in_a_row: steps skipped since the last one that was not.
    """

    def __init__(self) -> None:
        self.skipped = self.skipped_in_a_row = 0
        self._total, self._count = 0.0, 0
        self._window: list[tuple[float, float]] = []  # (loss, |projected gradient|) of the steps since the last log

    def add(self, record: dict[str, Any], logged: bool = False) -> None:
        """Add a step's record; ``logged`` where an earlier start of the run has logged it."""
        self.skipped += bool(record["skipped"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0
        loss = record["loss"]
        if math.isfinite(loss):
            self._total, self._count = self._total + loss, self._count + 1
            if not logged:
                # Over the step's directions.
                projected_grad = sum(map(abs, record["projected_grad"])) / len(record["projected_grad"])
                self._window.append((loss, projected_grad))

    def take_window(self) -> dict[str, float]:
        """Return the means of the finite steps since the last call: ``loss`` and, if there are any, ``projected_grad``.

        ``skipped_steps`` counts those of the whole run, and is left out where there are none.
        """
        window, self._window = self._window, []
        skipped = {"skipped_steps": self.skipped} if self.skipped else {}
        if not window:
            return {"loss": math.nan, **skipped}
        loss, projected_grad = (sum(values) / len(window) for values in zip(*window, strict=True))
        return {"loss": loss, "projected_grad": projected_grad, **skipped}

    def mean_loss(self) -> float:
        """Return the mean loss of the run's finite steps; NaN where there are none."""
        return self._total / self._count if self._count else math.nan


def make_metrics_line(record: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """Return a step's line of metrics.jsonl.

    Args:
        record: the step's line of the journal.
        seconds: how long the step took; ``None`` where it is unknown.
    """
    estimates = record["projected_grad"]
    line = {
        "step": record["step"] + 1,
        "loss": record["loss"],
        "projected_grad": estimates[0] if len(estimates) == 1 else estimates,
        "lr": record["lr"],
    }
    if record["skipped"]:
        line["skipped"] = True
    return {**line, "seconds": None if seconds is None else round(seconds, 6)}
