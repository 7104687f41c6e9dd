"""Low-rank directions: Z = probe · U Vᵀ on every matrix, a gaussian vector on everything else.

The factors of a direction are a few numbers per row and column, so they are drawn once a step, for all parameters of
the block in one flat buffer; nothing of a weight's size is ever drawn. :class:`Layout` says where each lies:

    left factors   U_i of each matrix [rows, rank], and the whole direction of each vector [elements, 1]
    right factors  V_i of each matrix [columns, rank]

The left factors are scaled by ``probe`` where they are drawn, so that z = left · rightᵀ. The noise of a left factor
has the parameter's key, that of a right one a key of its own (``noise.TAG_RIGHT``), which may stay for several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zowrap.numerics import noise
from zowrap.rules.base import Rule, Scalars
from zowrap.step.directions import LowRank
from zowrap.step.parameters import Parameter


@dataclass(frozen=True)
class Place:
    """One parameter as a matrix, and where its factors start in the buffer; ``right`` is None for a vector."""

    rows: int
    columns: int
    rank: int
    left: int
    right: int | None

    def left_of(self, buffer: Tensor) -> Tensor:
        """``[..., rows, rank]`` of a buffer ``[..., size]``."""
        return buffer.narrow(-1, self.left, self.rows * self.rank).unflatten(-1, (self.rows, self.rank))

    def right_of(self, buffer: Tensor) -> Tensor | None:
        """``[..., columns, rank]`` of a buffer ``[..., size]``; None for a vector."""
        if self.right is None:
            return None
        return buffer.narrow(-1, self.right, self.columns * self.rank).unflatten(-1, (self.columns, self.rank))


# Factors start at multiples of GRAIN, so that whose an element is takes one number for so many elements.
GRAIN_BITS = 5
GRAIN = 1 << GRAIN_BITS


class Layout:
    """The places of a block's factors in one flat buffer.

    Attributes:
        places: by parameter index.
        size: elements of the buffer.
        owner: int32 ``[size / GRAIN]``: whose each run of elements is, as a row of ``cat(keys, right_keys)``.
        start: int32 ``[2 parameters]``, first element of each owner.
        scale: float32 ``[2 parameters]``, what each owner's noise is multiplied by.
    """

    def __init__(self, parameters: Sequence[Parameter], indices: Sequence[int], law: LowRank) -> None:
        self.law = law
        self.places: dict[int, Place] = {}
        device = parameters[indices[0]].tensor.device
        starts, scales = [0] * (2 * len(parameters)), [1.0] * (2 * len(parameters))
        owners: list[Tensor] = []
        self.size = 0

        def take(owner: int, count: int, scale: float) -> int:
            start, grains = self.size, -(-count // GRAIN)
            starts[owner], scales[owner] = start, scale
            owners.append(torch.full((grains,), owner, dtype=torch.int32, device=device))
            self.size += grains * GRAIN
            return start

        for i in indices:
            rows, columns, rank = matrix_shape(parameters[i].tensor, law.rank)
            vector = parameters[i].tensor.ndim < 2
            left = take(i, rows * rank, 1.0 if vector else law.probe)
            right = None if vector else take(len(parameters) + i, columns * rank, 1.0)
            self.places[i] = Place(rows, columns, rank, left, right)
        self.owner = torch.cat(owners)
        self.start = torch.tensor(starts, dtype=torch.int32, device=device)
        self.scale = torch.tensor(scales, dtype=torch.float32, device=device)


def matrix_shape(w: Tensor, rank: int) -> tuple[int, int, int]:
    """(rows, columns, rank) of a tensor seen as a matrix; a vector is one column of rank 1."""
    if w.ndim < 2:
        return w.numel(), 1, 1
    return w.shape[0], w.numel() // max(w.shape[0], 1), rank


def draw(
    out: Tensor, owner: Tensor, start: Tensor, scale: Tensor, keys: Tensor, right_keys: Tensor, table: Tensor
) -> None:
    """Write the factors of several directions.

    Args:
        out: float32 ``[directions, size]``.
        owner, start, scale: of a :class:`Layout`.
        keys, right_keys: int32 ``[directions, parameters, 2]``.
        table: :func:`zowrap.numerics.noise.gaussian_table`.
    """
    index = torch.arange(out.shape[1], dtype=torch.int32, device=out.device)
    whose = owner.index_select(0, index >> GRAIN_BITS)
    element = index - start.index_select(0, whose)
    own = torch.cat((keys, right_keys), dim=1).index_select(1, whose)
    bits = noise.hash_bits(element, 0, own.permute(2, 0, 1))
    out.copy_(noise.gaussian(bits, table) * scale.index_select(0, whose))


def product(left: Tensor, right: Tensor | None, shape: torch.Size) -> Tensor:
    """z of one parameter from its factors ``[rows, rank]`` and ``[columns, rank]``, summed over the rank in order."""
    if right is None:
        return left.reshape(shape)
    total = left[:, 0, None] * right[:, 0]
    for k in range(1, left.shape[1]):
        total = total + left[:, k, None] * right[:, k]
    return total.reshape(shape)


def update_factors(
    layout: Layout, index: int, buffer: Tensor, g: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Factors of what one parameter's update goes along: ĝ = left · rightᵀ, in float32.

    Args:
        buffer: ``[directions, size]``.
        g: ``[directions]``, the rule's coefficients.
        own: the rule's ``"left"`` slot, which then stands in for Σ g_i U_i.

    Returns:
        ``[rows, k]`` and ``[columns, k]`` with k the rank times the number of directions; for a vector ``[rows, 1]``
        and None.
    """
    place = layout.places[index]
    left, right = place.left_of(buffer), place.right_of(buffer)
    factor = layout.law.update
    if own is not None:
        return own * factor, None if right is None else right[0]
    if right is None:
        return ((g * factor)[:, None, None] * left).sum(0), None
    left = left * (g * factor)[:, None, None]
    return left.transpose(0, 1).flatten(1), right.transpose(0, 1).flatten(1)


def realign_left(
    rule: Rule, layout: Layout, index: int, slot: Tensor, buffer: Tensor, old: Tensor, moved: Tensor, c: Scalars
) -> Tensor:
    """The new value of a rule's ``"left"`` slot.

    Args:
        slot: ``[rows, rank]``, expressed in the right factor of ``old``.
        buffer, old: ``[directions, size]`` and ``[1, size]``: factors of this step, and under the right keys that
            ``slot`` is expressed in.
        moved: 0-d bool: whether those are different.
        c: the rule's coefficients.
    """
    assert rule.left is not None
    place = layout.places[index]
    right, before = place.right_of(buffer), place.right_of(old)
    if right is not None and before is not None:
        projected = slot @ (before[0].t() @ right[0]) / place.columns
        slot = torch.where(moved, projected, slot)
    g_left = (c["g"][:, None, None] * place.left_of(buffer)).sum(0)
    return rule.left(slot, g_left, c)
