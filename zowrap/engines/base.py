"""What an engine does: evaluate the loss along a direction, and write an update. Nothing else differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zowrap.blocks import Block
from zowrap.directions import Direction
from zowrap.loss import Batch, LossModule
from zowrap.parameters import Parameter
from zowrap.rules.base import Rule, Scalars
from zowrap.step import Conclusion


@dataclass
class Job:
    """Everything an engine needs to know about the run: the model's loss, what moves, and how.

    Attributes:
        slots: ``slots[name][i]`` is the float32 state of ``parameters[i]``.
        blocks: which parameters are perturbed and updated together; one block of all of them by default.
        states: scalar state of the rule, 0-d float32 tensors by name, for each block.
        hyper: 0-d float32 tensors ``lr``, ``eps``, ``weight_decay``; their values change, the tensors stay.
        decays: whether a weight decay was asked for at all.
    """

    loss: LossModule
    parameters: list[Parameter]
    rule: Rule
    direction: Direction
    queries: int
    blocks: list[Block]
    states: list[Scalars]
    slots: dict[str, list[Tensor]]
    hyper: Scalars
    decays: bool
    device: torch.device

    def slots_of(self, index: int) -> Scalars:
        return {name: tensors[index] for name, tensors in self.slots.items()}

    def direction_slots_of(self, index: int) -> Scalars:
        return {name: self.slots[name][index] for name in self.rule.direction_slots}


@dataclass
class DirectionStream:
    """One direction of one step: where its noise comes from, and the numbers that shape it.

    Attributes:
        block: the active block.
        keys: int32 ``[P, 2]``, one key per parameter.
        scale: 0-d float32, the direction's normalisation (1 unless the law needs one).
        scalars: numbers that the rule's ``direction`` reads.
    """

    block: int
    keys: Tensor
    scale: Tensor
    scalars: Scalars


class Engine(Protocol):
    """The two engines."""

    name: str

    def losses(self, batch: Batch, stream: DirectionStream | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Loss sums float32 ``[points, rows]`` at θ + coefficients[p]·z, and weights float32 ``[rows]``.

        Only the stream's block is perturbed. ``stream`` None evaluates θ itself, as one point.
        """
        ...

    def squared_norm(self, block: int, keys: Tensor) -> Tensor:
        """0-d float64: ‖u‖² of the raw noise under ``keys`` over the block's elements."""
        ...

    def conclude(self, block: int, losses: Tensor, step: int, projected_grad: Tensor | None) -> Conclusion:
        """Losses → coefficients."""
        ...

    def update(self, streams: Sequence[DirectionStream], rounding_keys: Tensor, conclusion: Conclusion) -> None:
        """Write the weights, the slots and the scalar state: the only place that does."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for ``inspect``."""
        ...
