"""``update_`` and ``update_lowrank_``, the epilogue's operators and the only ones that write floating-point weights."""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import Cost, PersistentBuffers, Traits, operator
from zowrap.ops import kernels
from zowrap.ops.arguments import DrawnDirections, UpdateArgs
from zowrap.ops.scratch import buffers, chunks, longest


def _gradient_buffer(w: Tensor) -> PersistentBuffers:
    if w.ndim < 2:
        return {}
    columns = w.numel() // max(w.shape[0], 1)
    return {("gradient", torch.float32, 1): 4 * longest(w.shape[0], columns) * columns}


@operator(
    "update_lowrank_",
    traits=Traits(writes="w"),
    cost=Cost(flops=lambda w, left: 2 * left.shape[1] * w.numel(), buffers=_gradient_buffer),
    mutates=("w", "slots"),
)
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
    kernel_key: str,
    start: int = 0,
) -> None:
    """Apply the rule's update to one parameter, in place, with ĝ = left · rightᵀ formed chunk by chunk in a buffer.

    Args:
        start: number of the first element, where ``w`` and ``slots`` are a part of a parameter.
        left: float32 ``[rows, k]``.
        right: float32 ``[columns, k]``; None for a vector, in which case k is 1.
    """
    update, flat = kernels.get(kernel_key).update, w.view(-1)
    args = UpdateArgs(slots, rounding_key, coefficients, hyper, apply, decay).flat()
    if right is None:
        return update.write(flat, args, left.reshape(-1), start)
    rows, columns = left.shape[0], right.shape[0]
    (scratch,) = buffers("gradient", torch.float32, w.device, 1, longest(rows, columns) * columns)
    for first, last in chunks(rows, columns):
        low, high = first * columns, last * columns
        g = scratch[: high - low]
        torch.mm(left[first:last], right.t(), out=g.view(last - first, columns))
        update.write(flat[low:high], args.part(low, high), g, start + low)
    return None


@update_lowrank_.register_fake
def _(w, slots, left, right, rounding_key, coefficients, hyper, apply, decay, kernel_key, start=0):
    return None


def _sum_buffer(w: Tensor, keys: list[Tensor], kernel_key: str) -> PersistentBuffers:
    return kernels.get(kernel_key).update.persistent_buffers(w.numel(), len(keys))


@operator(
    "update_",
    traits=Traits(writes="w"),
    cost=Cost(noise=lambda w, keys: len(keys) * w.numel(), buffers=_sum_buffer),
    mutates=("w", "slots"),
)
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
    kernel_key: str,
) -> None:
    """Apply the rule's update to one parameter, in place; see :class:`zowrap.ops.arguments.UpdateArgs`."""
    args = UpdateArgs(slots, rounding_key, coefficients, hyper, apply, decay).flat()
    kernels.get(kernel_key).update.write(w.view(-1), args, DrawnDirections(keys, scales, scalars))


@update_.register_fake
def _(w, slots, keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay, kernel_key):
    return None
