"""What single operators compute, draw and hold, where their results alone do not say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import sdpa_flop_count

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.analysis import quantized
from zowrap.ops.scratch import longest

aten, ours = torch.ops.aten, torch.ops.zowrap

# Inductor has no code of its own for these: they are called, with their inputs and results in memory.
CALLED = {
    aten.sort.default, aten.sort.stable, aten.topk.default, aten.nonzero.default, aten.cumsum.default,
    aten.index_put.default, aten.bincount.default, aten.histc.default, aten.searchsorted.Tensor,
}  # fmt: skip
LOOK_UPS = {
    ours.rows.default,
    ours.perturb_rows.default,
    aten.embedding.default,
    aten.index.Tensor,
    aten.gather.default,
}
HEADS = {ours.head.default, ours.perturb_head.default}
_NOISE = {
    ours.perturb.default: 0,
    ours.perturb_linear.default: 1,
    ours.perturb_head.default: 1,
}  # operator → which argument is the weight


@dataclass
class Work:
    """What is computed and moved.

    Attributes:
        flops: floating-point operations of products, convolutions and attention; a multiplication and an addition are
            two. What fuses into their neighbours is limited by memory and counted in bytes alone.
        weight_bytes: read of parameters and buffers.
        activation_bytes: read and written of everything between.
        update_bytes: read and written of weights and rule state by the update.
        noise: random numbers drawn.
    """

    flops: float = 0
    weight_bytes: float = 0
    activation_bytes: float = 0
    update_bytes: float = 0
    noise: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> Work:
        return Work(**{name: value * factor for name, value in vars(self).items()})

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes + self.update_bytes


def noise_of(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    """Random numbers that a node draws: one for each element, whatever the number of points."""
    if node.target is ours.codes_points.default:
        return values[node.args[1]].numel()  # type: ignore[index]
    if node.target in _NOISE:
        return values[node.args[_NOISE[node.target]]].numel()  # type: ignore[index]
    return values[node][0].numel() if node.target is ours.perturb_rows.default else 0


def scratch_of(node: fx.Node, args: Any) -> int:
    """Bytes that an operator holds beside its inputs and results while it runs, and frees."""
    if node.target is ours.perturb_linear.default:
        xs, w, transposed = args[0], args[1], args[7]
        copied = sum(_size(x) for x in xs if not x.is_contiguous())
        if not transposed or w.shape[0] <= longest(*w.shape):
            return copied
        rows = xs[0].numel() // xs[0].shape[-1]  # sums over chunks: one more product, in float32 beside 16-bit results
        wide = 4 * args[6].shape[0] * rows * w.shape[1] if w.element_size() == 2 else 0
        return copied + wide + rows * w.shape[1] * w.element_size()
    if node.target in HEADS:
        several = node.target is ours.perturb_head.default
        xs, labels, added = (args[0], args[8], args[2]) if several else ([args[0]], args[5], args[2:4])
        copied = sum(_size(x) for x in xs if not x.is_contiguous())
        # Of each token at each point: label, running numbers and loss; beside a plain product, changed logits.
        numbers = labels.numel() * (labels.element_size() + 20 * len(xs))
        changes = min(len(added), 1) if several else sum(given is not None for given in added)
        return copied + numbers + changes * 4 * _head_rows(args[1], labels) * labels.numel()
    if node.target is ours.perturb_rows.default:
        return args[2].numel() * args[0].shape[1] * (args[0].element_size() + 4 * len(args[1]))
    if node.target is aten.scaled_dot_product_attention.default:
        mask = args[3] if len(args) > 3 else None
        weights = args[0].numel() // args[0].shape[-1] * 4  # the logarithm of each row's sum
        return weights + (mask.numel() * args[0].element_size() if mask is not None and mask.dtype == torch.bool else 0)
    return quantized.scratch_of(node, args)


Kept = dict[tuple[str, torch.dtype, int], int]


def kept_of(node: fx.Node, args: Any) -> Kept:
    """Bytes of the buffers that an operator keeps for the next step, as :mod:`zowrap.ops.scratch` tells them apart."""
    if node.target is ours.perturb_linear.default:
        w, points = args[1], args[6].shape[0]
        return {("weights", w.dtype, points): points * longest(*w.shape) * w.shape[1] * w.element_size()}
    if node.target not in HEADS:
        return quantized.kept_of(node, args)
    w, perturbed = args[1], node.target is ours.perturb_head.default
    labels, points = (args[8], args[7].shape[0]) if perturbed else (args[5], 1)
    rows = _head_rows(w, labels)
    kept: Kept = {("logits", w.dtype, 1): rows * labels.numel() * w.element_size()}
    if perturbed:
        kept["weights", w.dtype, points] = points * rows * w.shape[1] * w.element_size()
    return kept


def kept_for_update(w: Tensor) -> Kept:
    """The same of one parameter's update: of codes, or along a low-rank direction."""
    if not w.is_floating_point():
        return quantized.kept_for_update(w)
    if w.ndim < 2:
        return {}
    columns = w.numel() // max(w.shape[0], 1)
    return {("gradient", torch.float32, 1): 4 * longest(w.shape[0], columns) * columns}


def merged(kept: Iterable[Kept]) -> Kept:
    """One buffer serves everything that asks for it: each is as large as the largest wish."""
    result: Kept = {}
    for wishes in kept:
        for key, size in wishes.items():
            result[key] = max(result.get(key, 0), size)
    return result


def _head_rows(w: Tensor, labels: Tensor) -> int:
    """Rows of a vocabulary head that pass by at once, where no label is ignored."""
    return longest(w.shape[0], w.shape[1], labels.numel())


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _perturbed_product(x: Any, w: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Two operations for each element of the weight, for every row at every point."""
    transposed = rest[5]
    outputs = w[1] if transposed else w[0]
    inputs = w[0] if transposed else w[1]
    return sum(2 * inputs * outputs * math.prod(shape[:-1]) for shape in out_shape)


def _head(x: Any, w: Any, bias: Any, thin: Any, left: Any, labels: Any, **more: Any) -> int:
    return 2 * math.prod(labels) * w[0] * (w[1] + (thin[-1] if thin is not None else 0))


def _perturbed_head(
    x: Any, w: Any, bias: Any, slots: Any, key: Any, scale: Any, scalars: Any, *rest: Any, **_: Any
) -> int:
    coefficients, labels = rest[0], rest[1]
    return 2 * coefficients[0] * math.prod(labels) * w[0] * w[1]


def _attention(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


_FLOPS: dict[Any, Callable[..., int]] = {
    ours.perturb_linear: _perturbed_product,
    ours.perturb_head: _perturbed_head,
    ours.head: _head,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def flops() -> dict[Any, Callable[..., int]]:
    """Operator → its operations from shapes, beside those that torch knows."""
    return {**_FLOPS, **quantized.flops()}
