"""The result of a step: tensors for the caller, a line for the journal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class StepResult:
    """The result of a step. All are tensors: only reading one waits for the device.

    Attributes:
        loss: 0-d float32, the mean over the step's evaluations (not the loss at θ itself).
        projected_grad: float32, ``[]`` for one direction, ``[queries]`` for several, ``[batch]`` for a population.
        skipped: 0-d bool: a loss or projected gradient was not finite and nothing was changed.
        losses: float32, the evaluations in order: ``[points]``, and the rule's candidates where it asks for them;
            ``[points, batch]`` for a population.
        weights: float32 ``[batch]``, each example's share, for a population; else None.
    """

    loss: Tensor
    projected_grad: Tensor
    skipped: Tensor
    losses: Tensor
    weights: Tensor | None
    _facts: dict[str, Any] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """The step's line of the journal, ready for JSON: enough for :meth:`ZOModel.replay`."""
        return {
            **self._facts,
            **({} if self.weights is None else {"weights": self.weights.tolist()}),
            "loss": float(self.loss),
            "losses": self.losses.tolist(),
            "projected_grad": self.projected_grad.reshape(-1).tolist(),
            "skipped": bool(self.skipped),
        }
