"""Arguments of operators that belong together.

An operator's schema is flat. It packs these where it begins, and kernels and helpers take them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class NoiseArgs(NamedTuple):
    """What determines the direction z of one parameter, beside its weights.

    Attributes:
        slots: float32 of the parameter's shape: those that the rule's direction reads, in the rule's order.
        key: int32 ``[2]``.
        scale: 0-d float32, the direction's normalisation.
        scalars: 0-d float32, the numbers that the rule's direction reads, in the order of the kernels.
    """

    slots: Sequence[Tensor]
    key: Tensor
    scale: Tensor
    scalars: Sequence[Tensor]

    def flat(self) -> NoiseArgs:
        """With slots of one dimension."""
        return self._replace(slots=[s.reshape(-1) for s in self.slots])

    def part(self, first: int, last: int) -> NoiseArgs:
        """The elements (or rows) ``first … last`` of the slots."""
        return self._replace(slots=[s[first:last] for s in self.slots])

    def rows(self, ids: Tensor) -> NoiseArgs:
        """Those rows of the slots."""
        return self._replace(slots=[s.index_select(0, ids) for s in self.slots])

    def numbers(self) -> list[Tensor]:
        """What is the same for every element."""
        return [self.key, self.scale, *self.scalars]


class DrawnDirections(NamedTuple):
    """The directions of a step, of which an update forms ĝ again.

    Attributes:
        keys: int32 ``[2]`` for each query; ``scales``: 0-d float32 for each.
        scalars: as in :class:`NoiseArgs`, the same for all.
    """

    keys: Sequence[Tensor]
    scales: Sequence[Tensor]
    scalars: Sequence[Tensor]


class UpdateArgs(NamedTuple):
    """What a rule's update of one parameter takes, beside its weights and where ĝ comes from.

    Attributes:
        slots: float32 of the parameter's shape: every slot that the rule has of weights of this dtype.
        rounding_key: int32 ``[2]``.
        coefficients: the rule's, in the order of the kernels; without ``"g"`` where ĝ is given.
        hyper: ``(lr, eps, weight_decay)``, 0-d float32.
        apply: 0-d bool; False leaves everything as it is.
        decay: whether weight decay applies.
    """

    slots: Sequence[Tensor]
    rounding_key: Tensor
    coefficients: Sequence[Tensor]
    hyper: Sequence[Tensor]
    apply: Tensor
    decay: bool

    def flat(self) -> UpdateArgs:
        """With slots of one dimension, in the same memory."""
        return self._replace(slots=[s.view(-1) for s in self.slots])

    def part(self, first: int, last: int) -> UpdateArgs:
        """The elements ``first … last`` of the slots."""
        return self._replace(slots=[s[first:last] for s in self.slots])
