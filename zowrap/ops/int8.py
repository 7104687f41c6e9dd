"""The products of quantised weights, as library operators.

``int8_linear``   bitsandbytes' 8-bit product of one input: what a lowered layer calls, and what capture sees
``int8_points``   the same for several points at once: one integer product over their stacked rows reads the codes once
``nf4_linear``    the product of a 4-bit weight in the layout that processors with bfloat16 instructions take

Each is opaque to the compiler (it sees shapes only) and made of the library's own operators, in the library's own
order, so that its results are the library's bit for bit. Source: ``MatMul8bitLt`` and ``matmul_4bit`` of
bitsandbytes 0.50, LLM.int8() (2208.07339), QLoRA (2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator
from zowrap.ops.points import at_point, empty_products


def products(
    x: Sequence[Tensor], codes: Tensor, scale: Sequence[Tensor], bias: Sequence[Tensor], threshold: float
) -> list[Tensor]:
    """``[x_p · Wᵀ + bias_p for p]`` by one integer product; W = codes · scale_p / 127, and x rounded to 8 bit by row.

    Args:
        x: ``[..., inputs]`` of one dtype for each point; one for all of them where it is alone.
        codes: int8 ``[outputs, inputs]``.
        scale: float32 ``[outputs]``, the largest magnitude of each row of W: one for each point, or one for all.
        bias: ``[outputs]`` for each point, one for all, or none.
        threshold: columns of x in which some magnitude reaches it are multiplied in x's own dtype; 0: none are.
    """
    library = torch.ops.bitsandbytes
    points = max(len(x), len(scale), len(bias))
    rows = [t.reshape(-1, t.shape[-1]) for t in x]
    shapes = [(*t.shape[:-1], codes.shape[0]) for t in x]
    if not rows[0].numel():
        return empty_products(x, codes.shape[0], points)
    rounded = [library.int8_vectorwise_quant(r.to(torch.float16), threshold) for r in rows]
    stacked = rounded[0][0] if len(rounded) == 1 else torch.cat([r[0] for r in rounded])
    parts = library.int8_linear_matmul(stacked, codes).split([r.shape[0] for r in rows])
    out = []
    for p in range(points):
        part, row, (_, row_scale, columns) = at_point(parts, p), at_point(rows, p), at_point(rounded, p)
        own = at_point(scale, p)
        y = library.int8_mm_dequant(
            part.contiguous(), row_scale, own, dtype=row.dtype, bias=at_point(bias, p) if bias else None
        )
        if columns is not None and columns.numel():
            weight = library.int8_vectorwise_dequant(codes[:, columns].contiguous(), own).to(row.dtype)
            y = y.addmm(row[:, columns].contiguous(), weight.t())
        out.append(y.reshape(at_point(shapes, p)))
    return out


def product_flops(x: Sequence[Tensor], outputs: int) -> int:
    """Operations of the products of all ``x``, ``[..., inputs]`` each, with a matrix of ``outputs`` rows."""
    return sum(2 * math.prod(each.shape) * outputs for each in x)


def rows_of(x: Tensor) -> int:
    """The number of vectors ``[inputs]`` in ``x``."""
    return x.numel() // max(x.shape[-1], 1)


def rounding_scratch(x: Sequence[Tensor], outputs: int, points: int) -> int:
    """Bytes that :func:`products` holds while it rounds the inputs, or while it scales the results.

    It is that of the library's plain code, which processors run: inputs are rounded by way of float16 and float32
    copies, and integer results are scaled by way of float32 ones.
    """
    sizes, rows = [t.numel() for t in x], [rows_of(t) for t in x]
    made = points * max(rows) * outputs * x[0].element_size()  # the results, which are not there yet
    whole = sum(sizes)
    codes = whole * (2 if len(x) > 1 else 1)
    scaling = codes + 4 * outputs * (sum(rows) + max(rows))
    product = 0
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # Without these instructions the library multiplies in float32, and one layer's codes are a copy in it.
        product = codes + 4 * (whole + outputs * x[0].shape[-1] + outputs * sum(rows)) - made
    return max(whole + 10 * max(sizes) - made, product, scaling)


@operator(
    "int8_linear",
    traits=Traits(),
    cost=Cost(
        flops=lambda x, codes: product_flops([x], codes.shape[0]),
        scratch=lambda x, codes: rounding_scratch([x], codes.shape[0], 1),
    ),
)
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """See :func:`products`: one point."""
    return products([x], codes, [scale], [] if bias is None else [bias], threshold)[0]


@int8_linear.register_fake
def _(x, codes, scale, bias, threshold):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@operator(
    "int8_points",
    traits=Traits(all_points=True),
    cost=Cost(
        flops=lambda x, codes: product_flops(x, codes.shape[0]),
        scratch=lambda x, codes, result: rounding_scratch(x, codes.shape[0], len(result)),
    ),
)
def int8_points(
    x: list[Tensor], codes: Tensor, scale: list[Tensor], bias: list[Tensor], threshold: float
) -> list[Tensor]:
    """See :func:`products`: all points of a step."""
    return products(x, codes, scale, bias, threshold)


@int8_points.register_fake
def _(x, codes, scale, bias, threshold):
    return empty_products(x, codes.shape[0], max(len(x), len(scale), len(bias)))


def _nf4_scratch(x: Tensor, shape: list[int]) -> int:
    return 0 if x.dtype == torch.bfloat16 else 2 * (x.numel() + rows_of(x) * shape[0])


@operator(
    "nf4_linear",
    traits=Traits(),
    cost=Cost(flops=lambda x, shape: product_flops([x], shape[0]), scratch=_nf4_scratch),
)
def nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, shape: list[int], blocksize: int, bias: Tensor | None
) -> Tensor:
    """x · Wᵀ + bias with W in the packed layout; ``shape`` is W's, ``code`` the table of its 16 values."""
    if not x.numel():
        return x.new_empty((*x.shape[:-1], shape[0]))
    y = torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, code, blocksize)
    return y if bias is None else y + bias


@nf4_linear.register_fake
def _(x, packed, absmax, code, shape, blocksize, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))
