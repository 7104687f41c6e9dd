"""Products with quantised weights, as operators.

``int8_linear``   bitsandbytes' 8-bit product for one input; lowered layers call it, so captured programs contain it
``int8_points``   the same for several points: one integer product over their stacked rows reads the codes once
``nf4_linear``    the product with a 4-bit weight in the layout for processors with bfloat16 instructions

The compiler sees only the shapes of these operators. Each calls bitsandbytes' own operators in the library's order, so
its results equal the library's bit for bit. Source: ``MatMul8bitLt`` and ``matmul_4bit`` of bitsandbytes 0.50,
LLM.int8() (2208.07339), QLoRA (2305.14314).
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
    """Compute ``[x_p · Wᵀ + bias_p for p]`` with one integer product.

    W is codes · scale_p / 127, and x is rounded to 8 bits row by row.

    Args:
        x: ``[..., inputs]`` for each point, all of one dtype, or a single tensor that all points share.
        codes: int8 ``[outputs, inputs]``.
        scale: the largest magnitude of each row of W, float32 ``[outputs]``: one for each point, or one for all.
        bias: ``[outputs]`` for each point, one for all, or none.
        threshold: columns of x with a magnitude of at least this are multiplied in x's own dtype; 0 disables it.
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
    """Return the FLOPs of the products of all ``x``, each ``[..., inputs]``, with a matrix of ``outputs`` rows."""
    return sum(2 * math.prod(each.shape) * outputs for each in x)


def rows_of(x: Tensor) -> int:
    """Return the number of vectors ``[inputs]`` in ``x``."""
    return x.numel() // max(x.shape[-1], 1)


def rounding_scratch(x: Sequence[Tensor], outputs: int, points: int) -> int:
    """Return the bytes that :func:`products` holds at its peak in addition to its results.

    The model is bitsandbytes' plain code, which CPUs run: it rounds inputs through float16 and float32 copies, and
    scales the integer results through float32 copies.
    """
    sizes, rows = [t.numel() for t in x], [rows_of(t) for t in x]
    made = points * max(rows) * outputs * x[0].element_size()  # the results, which do not exist yet
    whole = sum(sizes)
    codes = whole * (2 if len(x) > 1 else 1)
    scaling = codes + 4 * outputs * (sum(rows) + max(rows))
    product = 0
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        # Without these instructions the library multiplies in float32, with a float32 copy of the layer's codes.
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
    """Compute :func:`products` for one point."""
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
    """Compute :func:`products` for all points of a step."""
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
    """Compute x · Wᵀ + bias, with W in the packed layout.

    Args:
        code: the table of W's 16 values.
        shape: W's shape.
    """
    if not x.numel():
        return x.new_empty((*x.shape[:-1], shape[0]))
    y = torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, code, blocksize)
    return y if bias is None else y + bias


@nf4_linear.register_fake
def _(x, packed, absmax, code, shape, blocksize, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))
