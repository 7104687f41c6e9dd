"""What single operators compute, draw and hold, where their results alone do not say it.

Our own operators state it where they are defined (:class:`zowrap.custom_op.Cost`); what is here is of torch's, and of
libraries'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import sdpa_flop_count

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op
from zowrap.custom_op import PersistentBuffers

aten = torch.ops.aten

# Inductor has no code of its own for these: they are called, with their inputs and results in memory.
_CALLED = {
    aten.sort.default, aten.sort.stable, aten.topk.default, aten.nonzero.default, aten.cumsum.default,
    aten.index_put.default, aten.bincount.default, aten.histc.default, aten.searchsorted.Tensor,
}  # fmt: skip
_LOOK_UPS = {aten.embedding.default, aten.index.Tensor, aten.gather.default}
_GEMM = "bitsandbytes.gemm_4bit.default"  # of a library that need not be there


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


class OperatorCost(NamedTuple):
    """What one node costs beside reading its inputs and writing its results, see :class:`zowrap.custom_op.Cost`."""

    flops: int
    noise: int
    scratch: int
    buffers: PersistentBuffers


NO_COST = OperatorCost(0, 0, 0, {})


def is_called(target: Any) -> bool:
    """Whether a node of that target is a kernel of its own, whatever it costs."""
    return target in _CALLED or custom_op.find(target) is not None


def looks_up(target: Any) -> bool:
    """Whether a node of that target reads no more of a table than the rows that it returns."""
    found = custom_op.find(target)
    return target in _LOOK_UPS if found is None else found.traits.looks_up


def operator_cost(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, counted: int
) -> OperatorCost:
    """The cost of a node.

    Args:
        args, kwargs, result: fake values.
        counted: operations that torch's counter found in it, with :func:`flop_formulas` beside its own.
    """
    found = custom_op.find(node.target)
    if found is None:
        return OperatorCost(counted, 0, _scratch(node, args), {})
    arguments = {**found.bind(args, kwargs), "result": result}
    return OperatorCost(
        found.flops(arguments), found.noise(arguments), found.scratch(arguments), found.buffers(arguments)
    )


def _scratch(node: fx.Node, args: Sequence[Any]) -> int:
    if node.target is aten.scaled_dot_product_attention.default:
        mask = args[3] if len(args) > 3 else None
        weights = args[0].numel() // args[0].shape[-1] * 4  # the logarithm of each row's sum
        return weights + (mask.numel() * args[0].element_size() if mask is not None and mask.dtype == torch.bool else 0)
    if str(node.target) == _GEMM:
        # A 4-bit weight that is not in the processors' own layout is dequantised whole, one layer at a time.
        return math.prod(args[2]) * args[0].element_size()
    return 0


def merged(buffers: Iterable[PersistentBuffers]) -> PersistentBuffers:
    """One buffer serves everything that asks for it: each is as large as the largest wish."""
    result: PersistentBuffers = {}
    for wishes in buffers:
        for key, size in wishes.items():
            result[key] = max(result.get(key, 0), size)
    return result


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Operator → its operations from shapes, of those that torch's counter does not know and that are not ours."""
    formulas: dict[Any, Callable[..., int]] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        formulas[torch.ops.bitsandbytes.gemm_4bit] = _gemm
    return formulas


def _attention(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _gemm(x: Any, codes: Any, shape: Any, *rest: Any, **more: Any) -> int:
    return 2 * math.prod(x) * shape[0]
