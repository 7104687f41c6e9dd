"""The products of quantised weights, as library operators.

``int8_linear``   bitsandbytes' 8-bit product of one input: what a lowered layer calls, and what capture sees
``int8_points``   the same for several points at once: one integer product over their stacked rows reads the codes once
``nf4_linear``    the product of a 4-bit weight in the layout that processors with bfloat16 instructions take

Each is opaque to the compiler (it sees shapes only) and made of the library's own operators, in the library's own
order, so that its results are the library's bit for bit. Source: ``MatMul8bitLt`` and ``matmul_4bit`` of
bitsandbytes 0.50, LLM.int8() (2208.07339), QLoRA (2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.custom_op import operator


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
        return [x[p % len(x)].new_empty(shapes[p % len(x)]) for p in range(points)]
    rounded = [library.int8_vectorwise_quant(r.to(torch.float16), threshold) for r in rows]
    stacked = rounded[0][0] if len(rounded) == 1 else torch.cat([r[0] for r in rounded])
    parts = library.int8_linear_matmul(stacked, codes).split([r.shape[0] for r in rows])
    out = []
    for p in range(points):
        part, row, (_, row_scale, columns) = parts[p % len(x)], rows[p % len(x)], rounded[p % len(x)]
        own = scale[p % len(scale)]
        y = library.int8_mm_dequant(
            part.contiguous(), row_scale, own, dtype=row.dtype, bias=bias[p % len(bias)] if bias else None
        )
        if columns is not None and columns.numel():
            weight = library.int8_vectorwise_dequant(codes[:, columns].contiguous(), own).to(row.dtype)
            y = y.addmm(row[:, columns].contiguous(), weight.t())
        out.append(y.reshape(shapes[p % len(x)]))
    return out


@operator("int8_linear")
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """See :func:`products`: one point."""
    return products([x], codes, [scale], [] if bias is None else [bias], threshold)[0]


@int8_linear.register_fake
def _(x, codes, scale, bias, threshold):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@operator("int8_points")
def int8_points(
    x: list[Tensor], codes: Tensor, scale: list[Tensor], bias: list[Tensor], threshold: float
) -> list[Tensor]:
    """See :func:`products`: all points of a step."""
    return products(x, codes, scale, bias, threshold)


@int8_points.register_fake
def _(x, codes, scale, bias, threshold):
    points = max(len(x), len(scale), len(bias))
    return [x[p % len(x)].new_empty((*x[p % len(x)].shape[:-1], codes.shape[0])) for p in range(points)]


@operator("nf4_linear")
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
