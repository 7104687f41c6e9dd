"""What single operators compute, draw and hold, where their results alone do not say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import sdpa_flop_count

from zowrap import operators
from zowrap.program import Program

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
_NOISE = {ours.perturb.default: 0, ours.perturb_linear.default: 1}  # operator → which argument is the weight


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
    if node.target in _NOISE:
        return values[node.args[_NOISE[node.target]]].numel()  # type: ignore[index]
    return values[node][0].numel() if node.target is ours.perturb_rows.default else 0


def scratch_of(node: fx.Node, args: Any) -> int:
    """Bytes that an operator holds beside its inputs and results while it runs, and frees."""
    if node.target is ours.perturb_linear.default:
        xs, w, transposed = args[0], args[1], args[7]
        copied = sum(_size(x) for x in xs if not x.is_contiguous())
        if not transposed or w.shape[0] <= operators.SCRATCH_ELEMENTS // max(w.shape[1], 1):
            return copied
        rows = xs[0].numel() // xs[0].shape[-1]  # sums over chunks: one more product, in float32 beside 16-bit results
        wide = 4 * args[6].shape[0] * rows * w.shape[1] if w.element_size() == 2 else 0
        return copied + wide + rows * w.shape[1] * w.element_size()
    if node.target is ours.perturb_rows.default:
        return args[2].numel() * args[0].shape[1] * (args[0].element_size() + 4 * len(args[1]))
    if node.target is aten.scaled_dot_product_attention.default:
        mask = args[3] if len(args) > 3 else None
        weights = args[0].numel() // args[0].shape[-1] * 4  # the logarithm of each row's sum
        return weights + (mask.numel() * args[0].element_size() if mask is not None and mask.dtype == torch.bool else 0)
    return 0


def kept_scratch(programs: Iterable[Program]) -> int:
    """Bytes of the buffers that products with perturbed weights reuse from step to step, one for each point."""
    found: dict[tuple[torch.dtype, int], int] = {}
    for program in programs:
        for node in program.graph.find_nodes(op="call_function", target=ours.perturb_linear.default):
            w, points = node.args[1].meta["val"], program.points  # type: ignore[union-attr]
            rows, columns = (int(n) for n in w.shape)
            elements = max(1, min(rows, operators.SCRATCH_ELEMENTS // max(columns, 1))) * columns
            key = (w.dtype, points)
            found[key] = max(found.get(key, 0), elements * w.element_size() * points)
    return sum(found.values())


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _perturbed_product(x: Any, w: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Two operations for each element of the weight, for every row at every point."""
    transposed = rest[5]
    outputs = w[1] if transposed else w[0]
    inputs = w[0] if transposed else w[1]
    return sum(2 * inputs * outputs * math.prod(shape[:-1]) for shape in out_shape)


def _attention(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


FLOPS: dict[Any, Callable[..., int]] = {
    ours.perturb_linear: _perturbed_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
