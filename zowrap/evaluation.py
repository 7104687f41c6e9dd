"""Evaluation reduced batch by batch: sums and counts are all that is kept, so it needs no more memory than training.

The loss is the mean over label tokens (language models) or examples of the whole set: a mean of the batches' means
would weigh a short last batch like a full one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss import Batch, LossModule
from zowrap.modes import evaluation_mode

# (model output, batch) → for each metric the sum over the batch and the number of things summed.
BatchMetrics = Callable[[Any, Batch], Mapping[str, tuple[Any, Any]]]


@dataclass
class Evaluation:
    """The running sums of one evaluation.

    Attributes:
        sums: float64 0-d tensors by metric, ``loss`` among them.
        counts: what each sum is divided by.
        examples: rows seen.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0

    def add(self, name: str, total: Any, count: Any, device: torch.device) -> None:
        total = torch.as_tensor(total, device=device).detach().to(torch.float64)
        count = torch.as_tensor(count, device=device).detach().to(torch.float64)
        if total.ndim or count.ndim:
            raise ZOError(f"batch_metrics must give {name!r} as (sum, count), two numbers and not tensors with axes")
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts[name] + count if name in self.counts else count

    def means(self) -> dict[str, float]:
        """Each metric's mean over the set; what nothing was counted for is left out."""
        counts = {name: float(count) for name, count in self.counts.items()}
        return {name: float(total) / counts[name] for name, total in self.sums.items() if counts[name] > 0}


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
    evaluation.add("loss", sums.double().sum(), weights.double().sum(), device)
    for name, (total, count) in (metrics(output, batch) if metrics else {}).items():
        evaluation.add(name, total, count, device)
    evaluation.examples += rows(batch)


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
    evaluation, loss = Evaluation(), LossModule(model, loss_fn)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        add_batch(evaluation, loss, batch, batch_metrics, device)
    if not evaluation.examples:
        raise ZOError("there is nothing to evaluate on: the evaluation set is empty")
    return {**evaluation.means(), "examples": evaluation.examples}
