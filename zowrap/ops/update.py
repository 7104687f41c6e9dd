"""``update_`` and ``update_lowrank_``, the epilogue's write: the only operators that change a floating-point weight."""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import operator
from zowrap.ops import kernels
from zowrap.ops.scratch import buffers, chunks, longest


@operator("update_lowrank_", mutates=("w", "slots"))
def update_lowrank_(
    w: Tensor,
    slots: list[Tensor],
    left: Tensor,
    right: Tensor | None,
    rounding_key: Tensor,
    coefficients: list[Tensor],
    hyper: list[Tensor],
    apply: Tensor,
    decay: bool,
    spec: str,
) -> None:
    """The rule's update of one parameter along ĝ = left · rightᵀ, in place; row chunks of ĝ pass through a scratch.

    Args:
        left: ``[rows, k]``, ``right`` ``[columns, k]`` (None for a vector, then k is 1), float32.
    """
    kernel, flat, flat_slots = kernels.get(spec), w.view(-1), [s.view(-1) for s in slots]
    if right is None:
        return kernel.update_along(flat, flat_slots, left.reshape(-1), rounding_key, coefficients, hyper, apply, decay)
    rows, columns = left.shape[0], right.shape[0]
    (scratch,) = buffers("gradient", torch.float32, w.device, 1, longest(rows, columns) * columns)
    for first, last in chunks(rows, columns):
        span = slice(first * columns, last * columns)
        g = scratch[: (last - first) * columns]
        torch.mm(left[first:last], right.t(), out=g.view(last - first, columns))
        parts = [s[span] for s in flat_slots]
        kernel.update_along(flat[span], parts, g, rounding_key, coefficients, hyper, apply, decay, span.start)


@update_lowrank_.register_fake
def _(w, slots, left, right, rounding_key, coefficients, hyper, apply, decay, spec):
    return None


@operator("update_", mutates=("w", "slots"))
def update_(
    w: Tensor,
    slots: list[Tensor],
    keys: list[Tensor],
    scales: list[Tensor],
    scalars: list[Tensor],
    rounding_key: Tensor,
    coefficients: list[Tensor],
    hyper: list[Tensor],
    apply: Tensor,
    decay: bool,
    spec: str,
) -> None:
    """The rule's update of one parameter, in place; see :meth:`zowrap.ops.kernels.Kernels.update`."""
    kernels.get(spec).update(
        w.view(-1), [s.view(-1) for s in slots], keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay
    )


@update_.register_fake
def _(w, slots, keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay, spec):
    return None
