"""Directions: the law of the random vector that a step looks along.

A direction z lives on all tunable parameters together. Each law is ``scale · u`` where u is the raw counter-based
noise of :mod:`zowrap.noise`, and the scale, one number per direction, is 1 except for the sphere laws:

==============  ===================  =========  ======================
name            scale                ‖z‖        E[z zᵀ]
==============  ===================  =========  ======================
gaussian        1                    ≈ √d       I
rademacher      1                    √d         I
sphere          √d / ‖u‖             √d         I
unit_sphere     1 / ‖u‖              1          I / d
==============  ===================  =========  ======================

The law is a choice with consequences: it changes what ε and η mean (algorithms of the papers differ in it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zowrap import noise
from zowrap.errors import ZOError, nearest


@dataclass(frozen=True)
class Direction:
    """A law of directions.

    Attributes:
        name: as the user writes it.
        law: the law of one element, a key of :data:`zowrap.noise.LAWS`.
        scale: ``scale(squared_norm, count) -> 0-d float32`` from ‖u‖² (0-d float64) and the number of elements d,
            or ``None`` when no norm is needed. A scale costs one more pass over the noise per direction.
    """

    name: str
    law: str
    scale: Callable[[Tensor, int], Tensor] | None = None

    @property
    def needs_norm(self) -> bool:
        return self.scale is not None


def _sphere(squared_norm: Tensor, count: int) -> Tensor:
    return (count / squared_norm).sqrt().to(torch.float32)


def _unit_sphere(squared_norm: Tensor, count: int) -> Tensor:
    return squared_norm.rsqrt().to(torch.float32)


DIRECTIONS: dict[str, Direction] = {
    direction.name: direction
    for direction in (
        Direction("gaussian", "gaussian"),
        Direction("rademacher", "rademacher"),
        Direction("sphere", "gaussian", _sphere),
        Direction("unit_sphere", "gaussian", _unit_sphere),
    )
}


def get(direction: str | Direction) -> Direction:
    """The direction of that name; a :class:`Direction` passes through.

    Raises:
        ZOError: the name is unknown (the message names the nearest one).
    """
    if isinstance(direction, Direction):
        return direction
    if direction not in DIRECTIONS:
        raise ZOError(f"unknown direction {direction!r}{nearest(direction, DIRECTIONS)}")
    return DIRECTIONS[direction]


def is_ours(direction: Direction) -> bool:
    """Whether this is one of :data:`DIRECTIONS`, which their names determine."""
    return DIRECTIONS.get(direction.name) is direction


# ‖u‖² is summed in integers: u is a multiple of 2⁻¹⁴, so u² · 2²⁸ is an integer and any order of summation, any
# chunking and any sharding give the same value. int64 holds it for 3·10¹⁰ elements.
_SQUARE_UNIT = round(1 / noise.GAUSSIAN_QUANTUM)


def integer_squares(u: Tensor) -> Tensor:
    """int64 ``(u / 2⁻¹⁴)²`` of float32 noise: exact."""
    steps = (u * _SQUARE_UNIT).to(torch.int64)
    return steps * steps


def squared_norm(total: Tensor) -> Tensor:
    """float64 ‖u‖² from the int64 sum of :func:`integer_squares`."""
    return total.to(torch.float64) * noise.GAUSSIAN_QUANTUM**2
