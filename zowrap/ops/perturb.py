"""Operators that a captured program uses instead of a perturbed weight.

``perturb``         a whole perturbed parameter for each point: for vectors, and for uses without a cheaper form
``perturb_linear``  a matrix product: row chunks of w ± εz are formed in a small reused buffer, once for all points
``perturb_lowrank`` a whole parameter perturbed by a product of thin factors; passes turn its uses into thin products

The compiler sees only the shapes of these operators, so it never inlines the noise into the code of each use. Each
takes its key as an input, so the noise depends only on the operator's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.custom_op import Cost, PersistentBuffers, Traits, operator
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.points import at_point, empty_products
from zowrap.ops.scratch import chunks, copied_bytes, longest
from zowrap.step import lowrank
from zowrap.step.arithmetic import perturb_weight


@operator(
    "perturb",
    traits=Traits(perturbs="w", all_points=True),
    cost=Cost(noise=lambda w: w.numel()),
)
def perturb(
    w: Tensor,
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[w + coefficients[p] · z for p]``, each of ``w``'s shape and dtype."""
    out = [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]
    noise = NoiseArgs(slots, key, scale, scalars).flat()
    kernels.get(kernel_key).perturbation.write(w.reshape(-1), noise, coefficients, [o.view(-1) for o in out])
    return out


@perturb.register_fake
def _(w, slots, key, scale, scalars, coefficients, kernel_key):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]


def _product_flops(w: Tensor, result: list[Tensor]) -> int:
    return sum(2 * w.shape[0] * w.shape[1] * math.prod(y.shape[:-1]) for y in result)


def _product_scratch(x: list[Tensor], w: Tensor, coefficients: Tensor, transposed: bool) -> int:
    copied = copied_bytes(x)
    if not transposed or w.shape[0] <= longest(*w.shape):
        return copied
    rows = x[0].numel() // x[0].shape[-1]  # summing chunks takes one more product, and float32 for 16-bit results
    wide = 4 * coefficients.shape[0] * rows * w.shape[1] if w.element_size() == 2 else 0
    return copied + wide + rows * w.shape[1] * w.element_size()


def _product_buffers(w: Tensor, coefficients: Tensor) -> PersistentBuffers:
    points = coefficients.shape[0]
    return {("weights", w.dtype, points): points * longest(*w.shape) * w.shape[1] * w.element_size()}


@operator(
    "perturb_linear",
    traits=Traits(all_points=True),
    cost=Cost(flops=_product_flops, noise=lambda w: w.numel(), scratch=_product_scratch, buffers=_product_buffers),
)
def perturb_linear(
    x: list[Tensor],
    w: Tensor,
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    transposed: bool,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[x[p] · (w + coefficients[p] · z)ᵀ for p]`` without a perturbed copy of ``w``.

    Args:
        x: ``[..., inputs]`` for each point, or a single tensor that all points share.
        w: ``[outputs, inputs]``, or ``[inputs, outputs]`` if ``transposed``.
    """
    noise, points = NoiseArgs(slots, key, scale, scalars), coefficients.shape[0]
    inputs = [t.reshape(-1, t.shape[-1]) for t in x]
    rows, columns = w.shape
    outputs = columns if transposed else rows
    if w.is_cuda:
        from zowrap.ops.triton import product

        if product.applies(inputs, w):
            out = product.perturbed_products(inputs, w, noise, coefficients, transposed, kernel_key)
            return _with_shapes_of(x, out)
    # A transposed product is summed over the chunks, in float32, so that 16-bit sums do not lose the later chunks.
    sums = torch.promote_types(w.dtype, torch.float32) if transposed and longest(rows, columns) < rows else w.dtype
    out = [torch.empty((inputs[0].shape[0], outputs), dtype=sums, device=w.device) for _ in range(points)]
    perturbation = kernels.get(kernel_key).perturbation
    for first, last, weights in perturbation.chunks(w, noise, coefficients, chunks(rows, columns)):
        for p, weight in enumerate(weights):
            source = at_point(inputs, p)
            if not transposed:
                torch.mm(source, weight.t(), out=out[p][:, first:last])
            elif first == 0:
                out[p].copy_(source[:, first:last] @ weight)
            else:
                out[p] += source[:, first:last] @ weight
    return _with_shapes_of(x, [o.to(w.dtype) for o in out])


def _with_shapes_of(x: Sequence[Tensor], out: Sequence[Tensor]) -> list[Tensor]:
    """Reshape each ``out[p]``, ``[tokens, outputs]``, to the leading dimensions of the point's x."""
    return [o.view(*at_point(x, p).shape[:-1], o.shape[-1]) for p, o in enumerate(out)]


@perturb_linear.register_fake
def _(x, w, slots, key, scale, scalars, coefficients, transposed, kernel_key):
    return empty_products(x, w.shape[1] if transposed else w.shape[0], coefficients.shape[0], w.dtype)


@operator("perturb_lowrank", traits=Traits(perturbs="w", all_points=True), cost=Cost())
def perturb_lowrank(w: Tensor, left: Tensor, right: Tensor | None, coefficients: Tensor) -> list[Tensor]:
    """Compute ``[w + coefficients[p] · left · rightᵀ for p]``.

    Args:
        left: ``[rows, rank]``.
        right: ``[columns, rank]``; None for a vector.
    """
    z = lowrank.product(left, right, w.shape)
    return [perturb_weight(w, z, c).contiguous() for c in coefficients]


@perturb_lowrank.register_fake
def _(w, left, right, coefficients):
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(coefficients.shape[0])]


@perturb_lowrank.register_vmap
def _(info, in_dims, w, left, right, coefficients):
    """Map over examples, each with its own factors and its own copy of the parameter; only for small parameters."""
    left = left.movedim(in_dims[1], 0)
    z = left if right is None else left @ right.movedim(in_dims[2], 0).mT
    z = z.reshape(info.batch_size, *w.shape)
    return [perturb_weight(w, z, c).contiguous() for c in coefficients.unbind()], [0] * coefficients.shape[0]
