"""Evaluation reduced batch by batch: sums and counts are all that is kept, so it needs no more memory than training.

The loss is the mean over label tokens (language models) or examples of the whole set: a mean of the batches' means
would weigh a short last batch like a full one. Where a figure is known row by row, the rows' numbers are kept as well
(a few bytes each): they say how sure the mean is, and whether it differs from an earlier one beyond chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import Batch, LossModule
from zowrap.numerics import intervals

# (model output, batch) → for each metric the sum over the batch and the number of things summed; or, for intervals,
# both as tensors [rows].
BatchMetrics = Callable[[Any, Batch], Mapping[str, tuple[Any, Any]]]


@dataclass
class Evaluation:
    """The running sums of one evaluation.

    Attributes:
        sums: float64 0-d tensors by metric, ``loss`` among them.
        counts: what each sum is divided by.
        examples: rows seen.
        by_row: (sums, counts) of each batch, float64 ``[rows]``, by metric, of batches that tell them.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    by_row: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, name: str, total: Any, count: Any, device: torch.device, rows: int = 0) -> None:
        """Add a batch of ``rows``: two numbers, or two tensors ``[rows]``."""
        total = torch.as_tensor(total, device=device).detach().to(torch.float64)
        count = torch.as_tensor(count, device=device).detach().to(torch.float64)
        if rows and total.shape == count.shape == (rows,):
            self.by_row.setdefault(name, []).append((total, count))
            total, count = total.sum(), count.sum()
        if total.ndim or count.ndim:
            raise ZOError(
                f"batch_metrics must give {name!r} as (sum, count), two numbers or two tensors with an entry per row, "
                "and no other tensors"
            )
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def add_loss(self, sums: Tensor, weights: Tensor, rows: int, device: torch.device) -> None:
        """Add a batch's loss as a :class:`zowrap.loss.module.LossModule` gives it: of each row, or of the batch as
        one.
        """
        sums, weights = sums.double(), weights.double()
        if sums.shape != (rows,):
            sums, weights = sums.sum(), weights.sum()
        self.add("loss", sums, weights, device, rows)

    def means(self) -> dict[str, float]:
        """Each metric's mean over the set; what nothing was counted for is left out."""
        counts = {name: float(count) for name, count in self.counts.items()}
        return {name: float(total) / counts[name] for name, total in self.sums.items() if counts[name] > 0}

    def rows(self) -> Rows:
        """What is known of each row, by metric."""
        found = {}
        for name, parts in self.by_row.items():
            sums, counts = (torch.cat(each).tolist() for each in zip(*parts, strict=True))
            if len(sums) == self.examples:
                found[name] = {"sums": sums, "counts": counts}
        return found


# metric → "sums" and "counts" → one number per row: ready for JSON.
Rows = dict[str, dict[str, list[float]]]


def certainty(now: Rows, before: Rows | None = None) -> dict[str, dict[str, Any]]:
    """How sure each metric is: ``interval``, ``[low, high]`` of 95 %, and how many rows got ``better`` and ``worse``.

    The last two where ``before`` is of the same rows. A lower loss is better, and a higher value of anything else.
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
def forward(loss: LossModule, batch: Batch, outputs: bool) -> tuple[Tensor, Tensor, Any]:
    """Loss sums and weights of one batch in evaluation mode and, if asked for, the model's output in the same forward.

    Args:
        loss: the model and its loss.
        batch: tensors on the model's device.
    """
    loss.settle(batch)
    seen: list[Any] = []
    hook = loss.model.register_forward_hook(lambda module, inputs, output: seen.append(output)) if outputs else None
    try:
        with evaluation_mode(loss):
            sums, weights = loss(dict(batch))
            if outputs and not seen:  # a loss function that goes past the model's own forward
                seen.append(loss.model(**batch))
    finally:
        if hook is not None:
            hook.remove()
    return sums, weights, seen[-1] if outputs else None


def add_batch(
    evaluation: Evaluation, loss: LossModule, batch: Batch, metrics: BatchMetrics | None, device: torch.device
) -> None:
    """Evaluate one batch and add it; ``metrics`` reads the output of the forward that the loss is computed from."""
    sums, weights, output = forward(loss, batch, outputs=metrics is not None)
    evaluation.examples += rows(batch)
    evaluation.add_loss(sums, weights, rows(batch), device)
    for name, (total, count) in (metrics(output, batch) if metrics else {}).items():
        evaluation.add(name, total, count, device, rows(batch))


def rows(batch: Batch) -> int:
    """Examples in a batch."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    batch_metrics: BatchMetrics | None = None,
) -> dict[str, float]:
    """Loss and metrics of ``model`` over ``batches`` (tensors on the model's device).

    Returns:
        ``{"loss": …, <metric>: …, "examples": …}``.

    Raises:
        ZOError: there is no batch.
    """
    evaluation = run(model, batches, loss_fn, batch_metrics)
    return {**evaluation.means(), "examples": evaluation.examples}


def run(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
    batch_metrics: BatchMetrics | None = None,
) -> Evaluation:
    """As :func:`evaluate`, with the sums and what is known of each row."""
    evaluation, loss = Evaluation(), LossModule(model, loss_fn)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        add_batch(evaluation, loss, batch, batch_metrics, device)
    if not evaluation.examples:
        raise ZOError("there is nothing to evaluate on: the evaluation set is empty")
    return evaluation
