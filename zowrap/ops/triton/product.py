"""Compute x · (w ± εz)ᵀ at all points of a step from one read of w, for batches of few tokens.

Products of few tokens are limited by memory. The kernel reads each tile of the weight once, perturbs it for every point
in registers, rounding as a perturbed copy would, and multiplies each result with its point's activations. With many
tokens every block of tokens would have to draw the same noise again, so there :mod:`zowrap.ops.perturb` draws it once
into a scratch buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import trace
from zowrap.numerics.noise import gaussian_table
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.loops import split
from zowrap.ops.triton import sources
from zowrap.ops.triton.emit import Small, emit

# Up to this many tokens fit into one block, so the noise of a tile is drawn once.
FEW_TOKENS = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}  # float32 tiles take twice the memory
# The width of a weight tile: as many elements as fit into the registers with the noise of all points, and into the
# shared memory of small GPUs (the tests compile for them). The height is smaller if a matrix would otherwise have too
# few tiles for all processors (an H100 has 132). Both are fixed and not tuned at run time: another tiling sums in
# another order, and a resumed run would differ in the last bit.
TILE_INPUTS = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 16}
TILE_OUTPUTS, PROGRAMS = (64, 32, 16), 128


def applies(x: Sequence[Tensor], w: Tensor) -> bool:
    """Return whether this kernel computes the product of ``x``, each ``[tokens, inputs]``, with ``w``."""
    return w.is_cuda and x[0].shape[0] <= FEW_TOKENS.get(w.dtype, 0)


def perturbed_products(
    x: Sequence[Tensor],
    w: Tensor,
    noise: NoiseArgs,
    coefficients: Tensor,
    transposed: bool,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[tokens, outputs]`` for each point; see :func:`zowrap.ops.perturb.perturb_linear`.

    Args:
        x: ``[tokens, inputs]`` for each point, or a single tensor that all points share.
    """
    points = coefficients.shape[0]
    tokens, inputs = x[0].shape
    outputs = w.shape[1] if transposed else w.shape[0]
    out = [torch.empty((tokens, outputs), dtype=w.dtype, device=w.device) for _ in range(points)]
    if not tokens:
        return out
    kernel = _kernel(kernel_key, w.dtype, points, len(noise.slots), len(noise.scalars), len(x) == 1, transposed)
    rows = _tile_rows(outputs)
    block = max(16, 1 << (tokens - 1).bit_length())
    grid = (-(-outputs // rows), -(-tokens // block))
    given = [*(t.contiguous() for t in x), *out, w, *noise.slots, *noise.numbers(), coefficients]
    with torch.cuda.device_of(w):
        sources.launch(
            kernel,
            grid,
            *given,
            gaussian_table(w.device),
            tokens,
            outputs,
            inputs,
            TOKENS=block,
            OUTPUTS=rows,
            INPUTS=TILE_INPUTS[w.dtype],
            PRECISION=_precision(w),
            num_warps=4,
            num_stages=2,  # two stages of all points' tiles must fit into the shared memory of small GPUs
            enable_fp_fusion=False,
        )
    return out


def _precision(w: Tensor) -> str:
    """Return the precision of torch's products: TF32 only if the user allowed it, by torch's older or newer setting."""
    return "tf32" if w.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tile_rows(outputs: int) -> int:
    return next((rows for rows in TILE_OUTPUTS if outputs >= rows * PROGRAMS), TILE_OUTPUTS[-1])


@functools.cache
def _kernel(
    kernel_key: str, dtype: torch.dtype, points: int, slots: int, scalars: int, shared: bool, transposed: bool
) -> Any:
    return sources.kernel(_source(kernel_key, dtype, points, slots, scalars, shared, transposed))


def _source(
    kernel_key: str, dtype: torch.dtype, points: int, slots: int, scalars: int, shared: bool, transposed: bool
) -> str:
    perturbation = kernels.get(kernel_key).perturbation
    element, index = torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=torch.int32)
    small = [torch.zeros(2, dtype=torch.int32), torch.ones(()), *[torch.ones(())] * scalars]
    small += [torch.zeros(points), gaussian_table()]
    examples = [element, index, index, *[torch.zeros(64)] * slots, *small]

    def function(*inputs: Tensor) -> tuple:
        given = split(inputs, 3, slots, 2, scalars, 2)
        (w, low, high), slot_values, (key, scale), numbers, (coefficients, table) = given
        noise = NoiseArgs(slot_values, key, scale, numbers)
        return perturbation.points(w, low, high, noise, coefficients, table)

    graph_module, _ = trace(function, examples, range(3 + slots))
    read = [f"s{i}" for i in range(slots)]
    names = ["key", "scale", *[f"number{i}" for i in range(scalars)], "coefficients", "table"]
    body = emit(graph_module, ["e", "low", "high", *read, *map(Small, names)], lambda name: name)

    sources_of = ["x0"] * points if shared else [f"x{p}" for p in range(points)]
    given = [*dict.fromkeys(sources_of), *[f"o{p}" for p in range(points)], "w", *[f"t{i}" for i in range(slots)]]
    address = "k[None, :] * outputs + n[:, None]" if transposed else "n[:, None] * inputs + k[None, :]"
    loop = [
        "k = start + tl.arange(0, INPUTS).to(tl.int64)",
        "inside = (n[:, None] < outputs) & (k[None, :] < inputs)",
        f"index = {address}",
        "low, high = index.to(tl.int32), (index >> 32).to(tl.int32)",
        "e = tl.load(w + index, mask=inside, other=0)",
        *[f"s{i} = tl.load(t{i} + index, mask=inside, other=0)" for i in range(slots)],
        *body.lines,
        "held = (m[:, None] < tokens) & (k[None, :] < inputs)",
        *[
            f"a_{x} = tl.load({x} + m[:, None] * inputs + k[None, :], mask=held, other=0)"
            for x in dict.fromkeys(sources_of)
        ],
        # Elements outside the matrix may have any value by now, even NaN, so they are set to 0.
        *[
            f"b{p} = tl.trans(tl.where(inside, {text}, 0.0).to(w.dtype.element_ty))"
            for p, text in enumerate(body.outputs)
        ],
        *[f"c{p} = tl.dot(a_{x}, b{p}, c{p}, input_precision=PRECISION)" for p, x in enumerate(sources_of)],
    ]
    lines = [
        "n = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)",
        "m = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)",
        *body.once,
        *[f"c{p} = tl.zeros((TOKENS, OUTPUTS), tl.float32)" for p in range(points)],
        "for start in range(0, inputs, INPUTS):",
        *[f"    {line}" for line in loop],
        "written = (m[:, None] < tokens) & (n[None, :] < outputs)",
        *[
            f"tl.store(o{p} + m[:, None] * outputs + n[None, :], c{p}.to(o{p}.dtype.element_ty), mask=written)"
            for p in range(points)
        ],
    ]
    constants = [f"{name}: tl.constexpr" for name in ("TOKENS", "OUTPUTS", "INPUTS", "PRECISION")]
    arguments = ", ".join([*given, *names, "tokens", "outputs", "inputs", *constants])
    # Specialising on the alignment of these arguments gains nothing, and each alignment would compile another kernel.
    head = f"@triton.jit(do_not_specialize={[*names, 'tokens']})\ndef kernel({arguments}):\n"
    return head + "".join(f"    {line}\n" for line in lines)
