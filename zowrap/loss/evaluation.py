"""Evaluate loss and metrics over a set, keeping only sums and counts, so that it needs no more memory than training.

The loss is the mean over all label tokens (language models) or examples of the set: a mean of the batches' means would
weigh a short last batch like a full one. If a metric is known row by row, the rows' numbers are kept too (a few bytes
each), to tell how certain the mean is, and whether it differs significantly from an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import Batch, LossModule, count_rows
from zowrap.numerics import intervals

# (model output, batch) → for each metric the sum over the batch and the number of summands; or, to get intervals, both
# as tensors [rows].
BatchMetrics = Callable[[Any, Batch], Mapping[str, tuple[Any, Any]]]


@dataclass
class Evaluation:
    """The running sums of one evaluation.

    Attributes:
        sums: float64 0-d tensors by metric, including ``loss``.
        counts: the divisor of each sum.
        examples: the number of rows so far.
        by_row: by metric, (sums, counts) of each batch that gives them by row, float64 ``[rows]``.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    by_row: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, name: str, total: Any, count: Any, device: torch.device, rows: int = 0) -> None:
        """Add a batch's sum and count of one metric: two numbers, or two tensors ``[rows]``."""
        total = torch.as_tensor(total, device=device).detach().to(torch.float64)
        count = torch.as_tensor(count, device=device).detach().to(torch.float64)
        if rows and total.shape == count.shape == (rows,):
            self.by_row.setdefault(name, []).append((total, count))
            total, count = total.sum(), count.sum()
        if total.ndim or count.ndim:
            raise ZOError(
                f"batch_metrics must return {name!r} as (sum, count): two numbers, or two tensors with an entry per row"
            )
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def add_loss(self, sums: Tensor, weights: Tensor, rows: int, device: torch.device) -> None:
        """Add a batch's loss as :class:`zowrap.loss.module.LossModule` returns it, per row or as a single row."""
        sums, weights = sums.double(), weights.double()
        if sums.shape != (rows,):
            sums, weights = sums.sum(), weights.sum()
        self.add("loss", sums, weights, device, rows)

    def means(self) -> dict[str, float]:
        """The mean of each metric over the set, without those that have no counts."""
        counts = {name: float(count) for name, count in self.counts.items()}
        return {name: float(total) / counts[name] for name, total in self.sums.items() if counts[name] > 0}

    def find_broken_rows(self) -> list[int]:
        """List the rows whose loss is not finite, counted from 0; none where some batch gave no loss by row."""
        losses = self.rows().get("loss", {}).get("sums", [])
        return [row for row, loss in enumerate(losses) if not math.isfinite(loss)]

    def rows(self) -> Rows:
        """The sums and counts of each row, for the metrics that every batch gave by row."""
        found = {}
        for name, parts in self.by_row.items():
            sums, counts = (torch.cat(each).tolist() for each in zip(*parts, strict=True))
            if len(sums) == self.examples:
                found[name] = {"sums": sums, "counts": counts}
        return found


# metric → "sums" and "counts" → one number per row: ready for JSON.
Rows = dict[str, dict[str, list[float]]]


def measure_certainty(now: Rows, before: Rows | None = None) -> dict[str, dict[str, Any]]:
    """Measure how certain each metric is, and compare it row by row with an earlier evaluation.

    Returns:
        By metric: ``rows``, their number, ``interval``, [low, high] of 95 %, and if ``before`` has the same rows, the
        numbers of those that got ``better`` and ``worse``. A lower loss is better, and so is a higher value of any
        other metric.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, rows in now.items():
        sums, counts = rows["sums"], rows["counts"]
        facts: dict[str, Any] = {"rows": len(sums), "interval": intervals.confidence_interval(sums, counts)}
        earlier = (before or {}).get(name)
        if earlier is not None and earlier["counts"] == counts and None not in earlier["sums"]:
            sign = -1 if name.endswith("loss") else 1
            pairs = [sign * (b - a) for a, b in zip(earlier["sums"], sums, strict=True)]
            facts |= {"better": sum(change > 0 for change in pairs), "worse": sum(change < 0 for change in pairs)}
        found[name] = facts
    return found


@torch.no_grad()
def evaluate_batch(loss: LossModule, batch: Batch, outputs: bool) -> tuple[Tensor, Tensor, Any]:
    """Evaluate one batch in evaluation mode.

    Args:
        loss: the model and its loss.
        batch: tensors on the model's device.
        outputs: also return the model's output, of the same forward.

    Returns:
        Loss sums and weights, see :class:`zowrap.loss.module.LossModule`, and the output or None.
    """
    loss.settle(batch)
    seen: list[Any] = []
    hook = loss.model.register_forward_hook(lambda module, inputs, output: seen.append(output)) if outputs else None
    try:
        with evaluation_mode(loss):
            sums, weights = loss(dict(batch))
            if outputs and not seen:  # the loss function did not call the model's own forward
                seen.append(loss.model(**batch))
    finally:
        if hook is not None:
            hook.remove()
    return sums, weights, seen[-1] if outputs else None


def add_batch(
    evaluation: Evaluation, loss: LossModule, batch: Batch, metrics: BatchMetrics | None, device: torch.device
) -> None:
    """Evaluate one batch and add it to ``evaluation``; loss and metrics come from the same forward."""
    sums, weights, output = evaluate_batch(loss, batch, outputs=metrics is not None)
    evaluation.examples += count_rows(batch)
    evaluation.add_loss(sums, weights, count_rows(batch), device)
    for name, (total, count) in (metrics(output, batch) if metrics else {}).items():
        evaluation.add(name, total, count, device, count_rows(batch))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    batch_metrics: BatchMetrics | None = None,
) -> dict[str, float]:
    """Evaluate loss and metrics of ``model`` over ``batches`` (tensors on the model's device).

    Returns:
        ``{"loss": …, <metric>: …, "examples": …}``.

    Raises:
        ZOError: there is no batch.
    """
    evaluation = run_evaluation(model, batches, loss_fn, batch_metrics)
    return {**evaluation.means(), "examples": evaluation.examples}


def run_evaluation(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    batch_metrics: BatchMetrics | None = None,
) -> Evaluation:
    """Evaluate as :func:`evaluate` does, and return the sums and the numbers of each row."""
    evaluation, loss = Evaluation(), LossModule(model, loss_fn)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        add_batch(evaluation, loss, batch, batch_metrics, device)
    if not evaluation.examples:
        raise ZOError("the evaluation set is empty: there is nothing to evaluate on")
    return evaluation
