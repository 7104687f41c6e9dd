"""Groups of operator arguments.

An operator's schema is flat. The operator packs related arguments into these tuples and passes them on to kernels and
helpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class NoiseArgs(NamedTuple):
    """Everything except the weights that determines the direction z of one parameter.

    Attributes:
        slots: the slots that the rule's direction reads, in the rule's order; float32, of the parameter's shape.
        key: int32 ``[2]``.
        scale: normalisation of the direction, 0-d float32.
        scalars: the numbers that the rule's direction reads, in the kernels' order; 0-d float32.
    """

    slots: Sequence[Tensor]
    key: Tensor
    scale: Tensor
    scalars: Sequence[Tensor]

    def flat(self) -> NoiseArgs:
        """Return these arguments with slots flattened to one dimension."""
        return self._replace(slots=[s.reshape(-1) for s in self.slots])

    def part(self, first: int, last: int) -> NoiseArgs:
        """Return these arguments with the elements (or rows) ``first … last`` of the slots."""
        return self._replace(slots=[s[first:last] for s in self.slots])

    def rows(self, ids: Tensor) -> NoiseArgs:
        """Return these arguments with the rows ``ids`` of the slots."""
        return self._replace(slots=[s.index_select(0, ids) for s in self.slots])

    def numbers(self) -> list[Tensor]:
        """Return the tensors that are the same for every element."""
        return [self.key, self.scale, *self.scalars]


class DrawnDirections(NamedTuple):
    """The directions of a step, drawn again by an update to form ĝ.

    Attributes:
        keys: int32 ``[2]`` for each query.
        scales: 0-d float32 for each query.
        scalars: as in :class:`NoiseArgs`, shared by all queries.
    """

    keys: Sequence[Tensor]
    scales: Sequence[Tensor]
    scalars: Sequence[Tensor]


class UpdateArgs(NamedTuple):
    """The arguments of a rule's update of one parameter, except its weights and the source of ĝ.

    Attributes:
        slots: every slot that the rule has for weights of this dtype; float32, of the parameter's shape.
        rounding_key: int32 ``[2]``.
        coefficients: the rule's coefficients, in the kernels' order; without ``"g"`` if ĝ is given.
        hyper: ``(lr, eps, weight_decay)``, 0-d float32.
        apply: 0-d bool; if False, weights and slots stay unchanged.
        decay: whether weight decay applies.
    """

    slots: Sequence[Tensor]
    rounding_key: Tensor
    coefficients: Sequence[Tensor]
    hyper: Sequence[Tensor]
    apply: Tensor
    decay: bool

    def flat(self) -> UpdateArgs:
        """Return these arguments with slots flattened to one dimension, in the same memory."""
        return self._replace(slots=[s.view(-1) for s in self.slots])

    def part(self, first: int, last: int) -> UpdateArgs:
        """Return these arguments with the elements ``first … last`` of the slots."""
        return self._replace(slots=[s[first:last] for s in self.slots])
