"""The operators that a captured program uses in place of a perturbed weight.

``perturb``         a whole parameter at every point: for vectors, and for uses that have no cheaper form
``perturb_rows``    an embedding: noise for the touched rows only
``rows``            an embedding that nothing perturbs
``index_error``     stands before every other look-up: 0, or an error where an index is out of range
``recurrent``       an LSTM or its like, which compilers unroll for one length
``perturb_linear``  a matrix product: row chunks of w ± εz pass through a small reused scratch, once for all points
``perturb_lowrank`` a whole parameter along a product of thin factors; passes turn its uses into thin products
``attention``, ``gather``, ``cat``  torch's own, with a form for one example at a time: only while the population pass
records the program, which has torch's again when that is done
``update_``, ``update_lowrank_``  the epilogue's write: the only operators that change a weight

Each is opaque to the compiler (it sees shapes only), so noise never multiplies into the consumers' code, and each
carries its key, so that noise is a function of the operator's inputs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap import kernels, lowrank
from zowrap.library import operator
from zowrap.scratch import buffers, chunks, longest
from zowrap.step import perturbed


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


@operator("perturb_rows")
def perturb_rows(
    w: Tensor,
    slots: list[Tensor],
    ids: Tensor,
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    spec: str,
) -> list[Tensor]:
    """``[(w + coefficients[p] · z)[ids] for p]``: ``ids`` int64 or int32 of any shape, results
    ``[*ids.shape, columns]``.

    An id out of range: see :func:`rows`.
    """
    # The kernel is compiled for int64; of rows of one token the view has gaps.
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    touched = w.index_select(0, flat)
    gathered = [s.index_select(0, flat) for s in slots]
    points = coefficients.shape[0]
    out = kernels.get(spec).perturb_rows(touched, gathered, flat, key, scale, scalars, coefficients, points)
    return [o.view(*ids.shape, w.shape[1]) for o in out]


@perturb_rows.register_fake
def _(w, slots, ids, key, scale, scalars, coefficients, spec):
    return [w.new_empty((*ids.shape, w.shape[1])) for _ in range(coefficients.shape[0])]


@operator("rows")
def rows(w: Tensor, ids: Tensor) -> Tensor:
    """``w[ids]``; an id out of range raises ``IndexError`` on a CPU and is a device-side assertion on a GPU."""
    return w.index_select(0, ids.reshape(-1)).view(*ids.shape, *w.shape[1:])


@rows.register_fake
def _(w, ids):
    return w.new_empty((*ids.shape, *w.shape[1:]))


@rows.register_vmap
def _(info, in_dims, w, ids):
    """Over the examples: one look-up for all; where each has its own table, in all of them laid end to end."""
    w_dim, ids_dim = in_dims
    if ids_dim is None:
        ids, ids_dim = ids.expand(info.batch_size, *ids.shape), 0
    ids = ids.movedim(ids_dim, 0)
    if w_dim is None:
        return rows(w, ids), 0
    w = w.movedim(w_dim, 0)
    first = torch.arange(ids.shape[0], device=ids.device) * w.shape[1]
    return rows(w.flatten(0, 1), ids + first.view(-1, *[1] * (ids.ndim - 1))), 0


@operator("index_error")
def index_error(index: Tensor, size: int, wraps: bool, ignored: int | None) -> Tensor:
    """0-d zero of ``index``'s dtype, to be added to it: the look-up cannot run before it has been looked at.

    Args:
        index: int64 or int32 of any shape; ``size``: what it looks up has this many entries.
        wraps: negative numbers count from the end.
        ignored: a number that names no entry and is none the less allowed.

    Raises:
        IndexError: a number names no entry.
    """
    if index.numel():
        first = -size if wraps else 0
        lowest, highest = (int(value) for value in torch.aminmax(index))
        if lowest < first or highest >= size:
            wrong = index[((index < first) | (index >= size)) & (index != (first if ignored is None else ignored))]
            if wrong.numel():
                raise IndexError(f"index {int(wrong[0])} is out of range: there are {size} entries")
    return torch.zeros((), dtype=index.dtype, device=index.device)


@index_error.register_fake
def _(index, size, wraps, ignored):
    return index.new_zeros(())


@index_error.register_vmap
def _(info, in_dims, index, size, wraps, ignored):
    return index_error(index, size, wraps, ignored), None


@operator("recurrent")
def recurrent(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """torch's recurrent layers without dropout, for any batch and length.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: ``[length, rows, inputs]``; ``[rows, length, inputs]`` with ``batch_first``.
        states: the first one of each layer and direction, ``[layers · directions, rows, size]``; two of an LSTM.
        weights: as :class:`torch.nn.RNNBase` lists them.

    Returns:
        The outputs, laid out like ``x``, and the last states.
    """
    first = states if kind == "lstm" else states[0]
    rest = (has_biases, layers, 0.0, False, bidirectional, batch_first)
    return [result.contiguous() for result in getattr(torch.ops.aten, kind).input(x, first, weights, *rest)]


@recurrent.register_fake
def _(kind, x, states, weights, has_biases, layers, bidirectional, batch_first):
    size = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((*x.shape[:-1], size)), *[x.new_empty(state.shape) for state in states]]


@operator("attention")
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """torch's fused attention, without dropout, in a form that ``vmap`` can take: examples go along its batch."""
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


@operator("gather")
def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``torch.gather`` in a form that ``vmap`` can take when sizes vary."""
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


@operator("cat")
def cat(tensors: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` in a form that ``vmap`` can take when sizes vary."""
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
        from zowrap.gpu import product

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


@operator("update_lowrank_", mutates=("w", "slots"))
def update_lowrank_(
    w: Tensor,
    slots: list[Tensor],
    left: Tensor,
    right: Tensor | None,
    rounding_key: Tensor,
    coefficients: list[Tensor],
    hyper: list[Tensor],
    apply: Tensor,
    decay: bool,
    spec: str,
) -> None:
    """The rule's update of one parameter along ĝ = left · rightᵀ, in place; row chunks of ĝ pass through a scratch.

    Args:
        left: ``[rows, k]``, ``right`` ``[columns, k]`` (None for a vector, then k is 1), float32.
    """
    kernel, flat, flat_slots = kernels.get(spec), w.view(-1), [s.view(-1) for s in slots]
    if right is None:
        return kernel.update_along(flat, flat_slots, left.reshape(-1), rounding_key, coefficients, hyper, apply, decay)
    rows, columns = left.shape[0], right.shape[0]
    (scratch,) = buffers("gradient", torch.float32, w.device, 1, longest(rows, columns) * columns)
    for first, last in chunks(rows, columns):
        span = slice(first * columns, last * columns)
        g = scratch[: (last - first) * columns]
        torch.mm(left[first:last], right.t(), out=g.view(last - first, columns))
        parts = [s[span] for s in flat_slots]
        kernel.update_along(flat[span], parts, g, rounding_key, coefficients, hyper, apply, decay, span.start)


@update_lowrank_.register_fake
def _(w, slots, left, right, rounding_key, coefficients, hyper, apply, decay, spec):
    return None


@operator("update_", mutates=("w", "slots"))
def update_(
    w: Tensor,
    slots: list[Tensor],
    keys: list[Tensor],
    scales: list[Tensor],
    scalars: list[Tensor],
    rounding_key: Tensor,
    coefficients: list[Tensor],
    hyper: list[Tensor],
    apply: Tensor,
    decay: bool,
    spec: str,
) -> None:
    """The rule's update of one parameter, in place; see :meth:`zowrap.kernels.Kernels.update`."""
    kernels.get(spec).update(
        w.view(-1), [s.view(-1) for s in slots], keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay
    )


@update_.register_fake
def _(w, slots, keys, scales, scalars, rounding_key, coefficients, hyper, apply, decay, spec):
    return None
