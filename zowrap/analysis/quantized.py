"""What the products of quantised weights compute, and hold while they run; :mod:`zowrap.analysis.operators` asks.

What is held is that of the libraries' plain code, which processors run: inputs are rounded by way of float16 and
float32 copies, integer results scaled by way of float32 ones, and a 4-bit weight that is not in the processors' own
layout is dequantised whole, one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.ops.scratch import longest

ours = torch.ops.zowrap
_GEMM = "bitsandbytes.gemm_4bit.default"  # of a library that need not be there

Kept = dict[tuple[str, torch.dtype, int], int]


def scratch_of(node: fx.Node, args: Sequence[Any]) -> int:
    """Bytes held beside inputs and results."""
    if node.target is ours.int8_linear.default:
        return _rounding([args[0]], args[1].shape[0], 1)
    if node.target is ours.int8_points.default:
        return _rounding(args[0], args[1].shape[0], max(len(args[0]), len(args[2]), len(args[3])))
    if node.target is ours.codes_points.default:
        x, outputs, points = args[0], args[1].shape[0], args[9].shape[0]
        rows = [_rows(each) for each in x]
        floats = 4 * sum(t.numel() for t in x) * ((len(x) > 1) + (x[0].dtype != torch.float32))
        plain = sum(rows) * outputs * x[0].element_size()
        return plain + max(
            _rounding(x, outputs, len(x)) - (points - len(x)) * max(rows) * outputs * x[0].element_size(),
            floats + 4 * outputs * (sum(rows) + max(rows)),
        )
    if node.target is ours.nf4_linear.default:
        x, outputs = args[0], args[4][0]
        return 0 if x.dtype == torch.bfloat16 else 2 * (x.numel() + _rows(x) * outputs)
    if str(node.target) == _GEMM:
        return math.prod(args[2]) * args[0].element_size()
    return 0


def kept_of(node: fx.Node, args: Sequence[Any]) -> Kept:
    """Bytes of the buffers that are kept for the next step."""
    if node.target is not ours.codes_points.default:
        return {}
    return {(name, torch.float32, 1): _chunk(args[1]) for name in ("zeros", "direction")}


def kept_for_update(codes: Tensor) -> Kept:
    """The same of the update of one matrix of codes."""
    return {(name, torch.float32, 1): _chunk(codes) for name in ("old weights", "new weights")}


def flops() -> dict[Any, Callable[..., int]]:
    """Operator → its floating-point (or integer) operations from shapes, as torch counts them."""
    known: dict[Any, Callable[..., int]] = {
        ours.int8_linear: lambda x, codes, *rest, **_: _product([x], codes[0]),
        ours.int8_points: lambda x, codes, *rest, **_: _product(x, codes[0]),
        ours.codes_points: lambda x, codes, *rest, **_: 2 * _product(x, codes[0]),
        ours.nf4_linear: lambda x, packed, absmax, code, shape, *rest, **_: _product([x], shape[0]),
    }
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        known[torch.ops.bitsandbytes.gemm_4bit] = lambda x, codes, shape, *rest, **_: _product([x], shape[0])
    return known


def _product(x: Sequence[Sequence[int]], outputs: int) -> int:
    return sum(2 * math.prod(shape) * outputs for shape in x)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _rounding(x: Sequence[Tensor], outputs: int, points: int) -> int:
    """Of :func:`zowrap.ops.int8.products`: while the inputs are rounded, or while the results are scaled."""
    sizes, rows = [t.numel() for t in x], [_rows(t) for t in x]
    made = points * max(rows) * outputs * x[0].element_size()  # the results, which are not there yet
    whole = sum(sizes)
    codes = whole * (2 if len(x) > 1 else 1)
    scaling = codes + 4 * outputs * (sum(rows) + max(rows))
    product = 0
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # Without these instructions the library multiplies in float32, and one layer's codes are a copy in it.
        product = codes + 4 * (whole + outputs * x[0].shape[-1] + outputs * sum(rows)) - made
    return max(whole + 10 * max(sizes) - made, product, scaling)


def _chunk(matrix: Tensor) -> int:
    rows, columns = matrix.shape
    return 4 * longest(rows, columns) * columns
