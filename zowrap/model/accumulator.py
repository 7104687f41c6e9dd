"""The sums of a step's micro-batches, kept so that they combine exactly.

Sums and weights are added in float64 and divided once: a mean of means would be wrong where micro-batches differ in
label tokens. For a population every example keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zowrap.step.credit import Credit, Piece


@dataclass
class Measurement:
    """One micro-batch, in float64.

    Attributes:
        sums: losses ``[points]``; ``[points, rows]`` for a population.
        weight: 0-d; ``[rows]`` for a population.
        slope_sums: float64 ``[queries]``, sums of exact derivatives, where the estimator has them.
        pieces: residual credit, where the estimator assigns it.
    """

    sums: Tensor
    weight: Tensor
    slope_sums: Tensor | None = None
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Accumulator:
    """The micro-batches of a step so far.

    Attributes:
        batches: the micro-batches themselves, where the rule evaluates them again.
        credit: residual credit, where the estimator assigns it.
    """

    sums: Tensor | None = None
    weight: Tensor | None = None
    slope_sums: Tensor | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)
    credit: Credit = field(default_factory=Credit)

    def add(self, new: Measurement, batch: dict[str, Any] | None) -> Tensor:
        """Take in one micro-batch; returns its loss, the mean over its evaluations: 0-d float32."""
        if batch is not None:
            self.batches.append(batch)
        per_example = new.weight.ndim > 0
        if self.sums is None or self.weight is None:
            self.sums, self.weight, self.slope_sums = new.sums, new.weight, new.slope_sums
        elif per_example:
            self.sums = torch.cat((self.sums, new.sums), dim=1)
            self.weight = torch.cat((self.weight, new.weight))
        else:
            self.sums, self.weight = self.sums + new.sums, self.weight + new.weight
            if self.slope_sums is not None and new.slope_sums is not None:
                self.slope_sums = self.slope_sums + new.slope_sums
        return (new.sums.reshape(new.sums.shape[0], -1).sum(1) / new.weight.sum()).mean().float()

    @property
    def examples(self) -> int:
        """Examples so far, for a population."""
        return 0 if self.weight is None else self.weight.numel()

    def losses(self) -> Tensor:
        """float32 ``[points]``, or ``[points, batch]``; an example that has no labels has the loss 0."""
        assert self.sums is not None and self.weight is not None
        if self.weight.ndim:
            return torch.where(self.weight > 0, self.sums / self.weight.clamp(min=1e-30), self.sums).float()
        return (self.sums / self.weight).float()

    def shares(self) -> Tensor:
        """float32 ``[batch]``, for a population: each example's part of the whole weight."""
        assert self.weight is not None
        return (self.weight / self.weight.sum()).float()

    def size_of_credit(self) -> Tensor:
        """0-d float32: ‖G‖ of the mean loss."""
        assert self.weight is not None
        return (self.credit.squared_norm().sqrt() / self.weight).float()

    def slopes(self) -> Tensor | None:
        """float32 ``[queries]`` exact projected gradients, or None where losses stand for them."""
        if self.slope_sums is None or self.weight is None:
            return None
        return (self.slope_sums / self.weight).float()
