"""The costs of single operators that do not follow from their results: operations, random numbers, scratch memory.

Our own operators declare their costs where they are defined (:class:`zowrap.custom_op.Cost`). This module adds those of
torch and of other libraries.
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

# Inductor generates no code for these operators but calls them, with inputs and results in memory.
_CALLED = {
    aten.sort.default, aten.sort.stable, aten.topk.default, aten.nonzero.default, aten.cumsum.default,
    aten.index_put.default, aten.bincount.default, aten.histc.default, aten.searchsorted.Tensor,
}  # fmt: skip
_LOOK_UPS = {aten.embedding.default, aten.index.Tensor, aten.gather.default}
_GEMM = "bitsandbytes.gemm_4bit.default"  # from a library that may not be installed


@dataclass
class Work:
    """Computation and memory traffic.

    Attributes:
        flops: floating-point operations of products, convolutions and attention; a multiplication and an addition count
            as two. Operations that fuse into their neighbours are limited by memory and counted only in bytes.
        weight_bytes: bytes of parameters and buffers read.
        activation_bytes: bytes of all other values read and written.
        update_bytes: bytes of weights and rule state read and written by the update.
        noise: number of random numbers drawn.
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
    """The cost of a node in addition to reading inputs and writing results, see :class:`zowrap.custom_op.Cost`."""

    flops: int
    noise: int
    scratch: int
    buffers: PersistentBuffers


NO_COST = OperatorCost(0, 0, 0, {})


def is_called(target: Any) -> bool:
    """Return whether a node with this target always runs as a separate kernel."""
    return target in _CALLED or custom_op.find(target) is not None


def looks_up(target: Any) -> bool:
    """Return whether a node with this target reads only those rows of a table that it returns."""
    found = custom_op.find(target)
    return target in _LOOK_UPS if found is None else found.traits.looks_up


def operator_cost(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, counted: int
) -> OperatorCost:
    """Return the cost of a node.

    Args:
        args, kwargs, result: fake values.
        counted: operations counted by torch's counter, extended by :func:`flop_formulas`.
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
        # A 4-bit weight that is not in the packed CPU layout is fully dequantised, one layer at a time.
        return math.prod(args[2]) * args[0].element_size()
    return 0


def merged(buffers: Iterable[PersistentBuffers]) -> PersistentBuffers:
    """Merge buffers with equal keys: one buffer serves all operators that request it, with the largest size."""
    result: PersistentBuffers = {}
    for requested in buffers:
        for key, size in requested.items():
            result[key] = max(result.get(key, 0), size)
    return result


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return formulas for the operations of operators that are not ours and that torch's counter does not know."""
    formulas: dict[Any, Callable[..., int]] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        formulas[torch.ops.bitsandbytes.gemm_4bit] = _gemm
    return formulas


def _attention(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _gemm(x: Any, codes: Any, shape: Any, *rest: Any, **more: Any) -> int:
    return 2 * math.prod(x) * shape[0]
