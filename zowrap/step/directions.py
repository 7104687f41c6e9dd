"""Directions: the law of the random vector that a step looks along.

A direction z lives on all tunable parameters together. Most laws are ``scale · u`` where u is the raw counter-based
noise of :mod:`zowrap.numerics.noise`, and the scale, one number per direction, is 1 except for the sphere laws:

================  ==========================  =========  ======================
name              z                           ‖z‖        E[z zᵀ]
================  ==========================  =========  ======================
gaussian          u                           ≈ √d       I
rademacher        u, ±1                       √d         I
sphere            √d / ‖u‖ · u                √d         I
unit_sphere       1 / ‖u‖ · u                 1          I / d
lowrank(r)        U Vᵀ / √r for each matrix   ≈ √d       I
sparse(s)         u where |θ| is small        ≈ √(1−s)d  1 on the small, else 0
cone(theta)       see :mod:`zowrap.rules.conmezo`
================  ==========================  =========  ======================

The law is a choice with consequences: it changes what ε and η mean (algorithms of the papers differ in it).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zowrap.checks import check_count
from zowrap.errors import Option, ZOError, nearest
from zowrap.numerics import noise
from zowrap.rules.base import Rule
from zowrap.rules.conmezo import check_cone, with_cone_directions
from zowrap.rules.sparse_mezo import check_sparse, with_sparse_directions


@dataclass(frozen=True)
class LowRank:
    """Directions that are a product Z = probe · U Vᵀ on every matrix, U ``[rows, rank]`` and V ``[columns, rank]``.

    A tensor of more dimensions is the matrix of its first dimension by the rest; vectors are gaussian.

    Attributes:
        nu: steps between draws of V, which all directions of a step then share; None draws V with U.
        probe: factor of U Vᵀ at the points of a step.
        update: factor of Z in the update (LOZO divides by the rank there).
    """

    rank: int
    nu: int | None
    probe: float
    update: float = 1.0


@dataclass(frozen=True)
class Direction:
    """A law of directions.

    Attributes:
        name: as the user writes it.
        law: the law of one element, a key of :data:`zowrap.numerics.noise.LAWS`.
        scale: ``scale(squared_norm, count) -> 0-d float32`` from ‖u‖² (0-d float64) and the number of elements d,
            or ``None`` when no norm is needed. A scale costs one more pass over the noise per direction.
        lowrank: how matrices get a product of two thin ones, or ``None``.
        shape: what it makes of the rule, when it needs state of the rule's kind (a momentum, thresholds).
    """

    name: str
    law: str = "gaussian"
    scale: Callable[[Tensor, int], Tensor] | None = None
    lowrank: LowRank | None = None
    shape: Callable[[Rule], Rule] | None = None

    @property
    def needs_norm(self) -> bool:
        return self.scale is not None


def _sphere(squared_norm: Tensor, count: int) -> Tensor:
    return (count / squared_norm).sqrt().to(torch.float32)


def _unit_sphere(squared_norm: Tensor, count: int) -> Tensor:
    return squared_norm.rsqrt().to(torch.float32)


# What stands for a direction where none is drawn: ĝ is given as a product of thin matrices, as it is for low-rank ones.
CREDIT = Direction("none (residual credit)", lowrank=LowRank(rank=1, nu=None, probe=1.0))

DIRECTIONS: dict[str, Direction] = {
    direction.name: direction
    for direction in (
        Direction("gaussian"),
        Direction("rademacher", "rademacher"),
        Direction("sphere", scale=_sphere),
        Direction("unit_sphere", scale=_unit_sphere),
    )
}


def lowrank(rank: int = 1, nu: int | None = None) -> Direction:
    """Products of thin gaussian matrices: unit variance, a forward for the price of the plain one.

    Args:
        rank: r from 1. 1: the cheapest, and the estimate is unbiased for every rank.
        nu: keep V for so many steps (the lazy sampling of LOZO); None draws it with every direction.

    Raises:
        ZOError: a value outside its range.
    """
    check_count("direction 'lowrank'", rank=rank)
    if nu is not None:
        check_count("direction 'lowrank'", nu=nu)
    name = f"lowrank({rank})" if nu is None else f"lowrank({rank}, nu={nu})"
    return _ours(Direction(name, lowrank=LowRank(rank, nu, probe=rank**-0.5)))


def sparse(sparsity: float = 0.75, refresh: int = 1) -> Direction:
    """Gaussian on the smallest weights of each parameter, zero elsewhere; see :mod:`zowrap.rules.sparse_mezo`."""
    check_sparse("direction 'sparse'", sparsity, refresh)
    along = functools.partial(with_sparse_directions, sparsity=float(sparsity), refresh=refresh)
    return _ours(
        Direction(f"sparse({float(sparsity)}" + (f", refresh={refresh})" if refresh != 1 else ")"), shape=along)
    )


def cone(theta: float = 1.35, beta: float = 0.99, warmup: bool | int = False) -> Direction:
    """Gaussian within an angle of the momentum; see :mod:`zowrap.rules.conmezo`."""
    check_cone("direction 'cone'", theta, beta, warmup)
    along = functools.partial(with_cone_directions, theta=float(theta), beta=float(beta), warmup=warmup)
    extra = f", warmup={warmup}" if warmup is not False else ""
    return _ours(Direction(f"cone(theta={float(theta)}, beta={float(beta)}{extra})", shape=along))


def _lozo(rank: Any = None, nu: Any = None, scale: Any = None) -> Direction:
    """The probe and update of LOZO, which keeps U Vᵀ without 1/√r; reached through its rule."""
    if scale not in ("paper", "code"):
        raise ZOError(
            "lozo is a rule: ",
            Option("rule", "lozo"),
            "; its directions for other rules are ",
            Option("direction", "lowrank(r, nu=ν)"),
        )
    check_count("direction 'lozo'", rank=rank, nu=nu)
    update = 1 / rank if scale == "paper" else 1.0
    return _ours(Direction(f"lozo({rank}, {nu}, {scale})", lowrank=LowRank(rank, nu, probe=1.0, update=update)))


_made: dict[str, Direction] = {}


def _ours(direction: Direction) -> Direction:
    """The one direction of that name, which says all there is to it."""
    return _made.setdefault(direction.name, direction)


_FAMILIES: dict[str, Callable[..., Direction]] = {"lowrank": lowrank, "sparse": sparse, "cone": cone, "lozo": _lozo}
NAMES = (*DIRECTIONS, "lowrank(r)", "sparse(s)", "cone")


def get(direction: str | Direction) -> Direction:
    """The direction of that name, ``"gaussian"`` or with arguments, ``"lowrank(2)"``; an object passes through.

    Raises:
        ZOError: the name is unknown (the message names the nearest one), or its arguments are wrong.
    """
    if isinstance(direction, Direction):
        return direction
    if isinstance(direction, str) and direction in DIRECTIONS:
        return DIRECTIONS[direction]
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", direction) if isinstance(direction, str) else None
    if match and match[1] == "block":
        raise ZOError(
            "directions that live on one block at a time are chosen by ", Option("blocks", "layer"), " or name patterns"
        )
    if not match or match[1] not in _FAMILIES:
        raise ZOError("unknown ", Option("direction"), f" {direction!r}{nearest(str(direction), NAMES)}")
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        name, equals, text = part.rpartition("=")
        if equals:
            named[name.strip()] = _value(text.strip())
        else:
            positional.append(_value(part))
    try:
        return _FAMILIES[match[1]](*positional, **named)
    except TypeError:
        raise ZOError(Option("direction"), f" {direction!r} has arguments that {match[1]!r} does not take") from None


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
