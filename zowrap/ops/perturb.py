"""The operators that a captured program uses in place of a perturbed weight.

``perturb``         a whole parameter at every point: for vectors, and for uses that have no cheaper form
``perturb_linear``  a matrix product: row chunks of w ± εz pass through a small reused scratch, once for all points
``perturb_lowrank`` a whole parameter along a product of thin factors; passes turn its uses into thin products

Each is opaque to the compiler (it sees shapes only), so noise never multiplies into the consumers' code, and each
carries its key, so that noise is a function of the operator's inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import operator
from zowrap.ops import kernels
from zowrap.ops.scratch import chunks, longest
from zowrap.step import lowrank
from zowrap.step.arithmetic import perturbed


@operator("perturb")
def perturb(
    w: Tensor, slots: list[Tensor], key: Tensor, scale: Tensor, scalars: list[Tensor], coefficients: Tensor, spec: str
) -> list[Tensor]:
    """``[w + coefficients[p] · z for p]``, each of ``w``'s shape and dtype."""
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]
    kernels.get(spec).perturb(
        w.reshape(-1), [s.reshape(-1) for s in slots], key, scale, scalars, coefficients, [o.view(-1) for o in out]
    )
    return out


@perturb.register_fake
def _(w, slots, key, scale, scalars, coefficients, spec):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]


@operator("perturb_linear")
def perturb_linear(
    x: list[Tensor],
    w: Tensor,
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    transposed: bool,
    spec: str,
) -> list[Tensor]:
    """``[x[p] · (w + coefficients[p] · z)ᵀ for p]`` without a perturbed copy of ``w``.

    Args:
        x: one tensor ``[..., inputs]`` for each point, or a single one that all points share.
        w: ``[outputs, inputs]``; ``[inputs, outputs]`` with ``transposed``.
    """
    kernel, points = kernels.get(spec), coefficients.shape[0]
    inputs = [t.reshape(-1, t.shape[-1]) for t in x]
    rows, columns = w.shape
    outputs = columns if transposed else rows
    if w.is_cuda:
        from zowrap.ops.triton import product

        if product.applies(inputs, w):
            out = product.perturbed_products(inputs, w, slots, key, scale, scalars, coefficients, transposed, spec)
            return [o.view(*x[p % len(x)].shape[:-1], outputs) for p, o in enumerate(out)]
    # A transposed product adds up over the chunks: in float32, so that 16-bit sums do not lose the later chunks.
    sums = torch.promote_types(w.dtype, torch.float32) if transposed and longest(rows, columns) < rows else w.dtype
    out = [torch.empty((inputs[0].shape[0], outputs), dtype=sums, device=w.device) for _ in range(points)]
    runs = chunks(rows, columns)
    for first, last, weights in kernel.perturbed_chunks(w, slots, key, scale, scalars, coefficients, runs):
        for p, weight in enumerate(weights):
            source = inputs[p % len(inputs)]
            if not transposed:
                torch.mm(source, weight.t(), out=out[p][:, first:last])
            elif first == 0:
                out[p].copy_(source[:, first:last] @ weight)
            else:
                out[p] += source[:, first:last] @ weight
    return [o.to(w.dtype).view(*x[p % len(x)].shape[:-1], outputs) for p, o in enumerate(out)]


@perturb_linear.register_fake
def _(x, w, slots, key, scale, scalars, coefficients, transposed, spec):
    outputs = w.shape[1] if transposed else w.shape[0]
    return [w.new_empty((*x[p % len(x)].shape[:-1], outputs)) for p in range(coefficients.shape[0])]


@operator("perturb_lowrank")
def perturb_lowrank(w: Tensor, left: Tensor, right: Tensor | None, coefficients: Tensor) -> list[Tensor]:
    """``[w + coefficients[p] · left · rightᵀ for p]``; ``left`` ``[rows, rank]``, ``right`` ``[columns, rank]``."""
    z = lowrank.product(left, right, w.shape)
    return [perturbed(w, z, c).contiguous() for c in coefficients]


@perturb_lowrank.register_fake
def _(w, left, right, coefficients):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]


@perturb_lowrank.register_vmap
def _(info, in_dims, w, left, right, coefficients):
    """Over the examples, each with its own factors: a copy of the parameter for each, so for small ones alone."""
    left = left.movedim(in_dims[1], 0)
    z = left if right is None else left @ right.movedim(in_dims[2], 0).mT
    z = z.reshape(info.batch_size, *w.shape)
    return [perturbed(w, z, c).contiguous() for c in coefficients.unbind()], [0] * coefficients.shape[0]
