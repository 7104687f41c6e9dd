"""The best evaluation of a run: which one it is, and by which metric."""

from __future__ import annotations

import math
from typing import Any


class BestModel:
    """Keeps the best evaluation so far; the model of that step lies in the root of the run.

    An evaluation with a loss that is not finite is never the best. Few rows often give the same accuracy at several
    steps: the loss then decides between them.

    Args:
        metric: the metric to compare, with or without ``eval_``; by default the accuracy, else the loss.
        greater_is_better: whether a greater ``metric`` is better; by default it is, unless the metric is a loss.

    Attributes:
        step: the step of the best evaluation; ``None`` before there is one.
        value: its metric.
        key: the name of that metric in a line of metrics.jsonl.
    """

    def __init__(self, metric: str | None = None, greater_is_better: bool | None = None) -> None:
        self._metric, self._greater_is_better = metric, greater_is_better
        self.step: int | None = None
        self.value: float | None = None
        self.key: str | None = None
        self._loss: float | None = None

    def is_beaten_by(self, line: dict[str, Any]) -> bool:
        """Whether an evaluation, a line of metrics.jsonl, is better than every one kept; the first sets the metric."""
        if self.key is None:
            self.key = _choose_key(line, self._metric)
        if self.key is None:
            return False
        value: Any = line.get(self.key)
        losses = [each for name, each in line.items() if name.endswith("loss")]
        if not all(map(is_finite, (value, *losses))):
            return False
        greater = self._greater_is_better
        if self._metric is None or greater is None:
            greater = not self.key.endswith("loss")
        loss = self._loss_beside(line)
        better = self.value is None or (value > self.value if greater else value < self.value)
        tied = value == self.value and loss is not None and self._loss is not None and loss < self._loss
        return better or tied

    def keep(self, line: dict[str, Any]) -> None:
        """Keep an evaluation that beats the others."""
        assert self.key is not None, "is_beaten_by was not asked"
        self.step, self.value, self._loss = line["step"], float(line[self.key]), self._loss_beside(line)

    def _loss_beside(self, line: dict[str, Any]) -> float | None:
        """Return the loss of the evaluation set that the metric belongs to."""
        return line.get(str(self.key).rpartition("_")[0] + "_loss")


def is_finite(value: float | None) -> bool:
    """Whether a number of metrics.jsonl is finite; ``None`` stands there for one that is not."""
    return value is not None and math.isfinite(value)


def _choose_key(line: dict[str, Any], metric: str | None) -> str | None:
    if metric:
        key = f"eval_{metric.removeprefix('eval_')}"
        return key if key in line else None
    endings = ("eval_accuracy", "eval_loss", "_accuracy", "_loss")
    return next((key for ending in endings for key in line if key.endswith(ending)), None)
