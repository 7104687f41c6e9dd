"""torch's ``attention``, ``gather`` and ``cat`` with rules for ``vmap`` over examples.

Only the population pass uses them, while it records a program; then it replaces them by torch's operators again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator


@operator("attention", traits=Traits(), cost=Cost())
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """Compute torch's fused attention without dropout; under ``vmap`` the examples join the batch dimension."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    ).contiguous()


@attention.register_fake
def _(query, key, value, mask, causal, scale, grouped):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@attention.register_vmap
def _(info, in_dims, query, key, value, mask, causal, scale, grouped):
    def along_batch(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    given = [along_batch(x, d) for x, d in zip((query, key, value, mask), in_dims[:4], strict=True)]
    return attention(*given, causal, scale, grouped).unflatten(0, (info.batch_size, -1)), 0


@operator("gather", traits=Traits(plain_form=torch.ops.aten.gather.default), cost=Cost())
def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Compute ``torch.gather``, also under ``vmap`` with varying sizes."""
    return torch.gather(x, dim, index)


@gather.register_fake
def _(x, dim, index):
    return x.new_empty(index.shape)


@gather.register_vmap
def _(info, in_dims, x, dim, index):
    x, index = (
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in ((x, in_dims[0]), (index, in_dims[2]))
    )
    return gather(x, dim if dim < 0 else dim + 1, index), 0


@operator("cat", traits=Traits(plain_form=torch.ops.aten.cat.default), cost=Cost())
def cat(tensors: list[Tensor], dim: int) -> Tensor:
    """Compute ``torch.cat``, also under ``vmap`` with varying sizes."""
    return torch.cat(tensors, dim)


@cat.register_fake
def _(tensors, dim):
    return torch.cat(tensors, dim)


@cat.register_vmap
def _(info, in_dims, tensors, dim):
    tensors = [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims[0], strict=True)
    ]
    return cat(tensors, dim if dim < 0 else dim + 1), 0
