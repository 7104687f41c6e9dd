"""Operators for look-ups.

``perturb_rows``    a perturbed embedding, with noise for the looked-up rows only
``rows``            an unperturbed embedding
``index_error``     the check before every other look-up: returns 0, or raises an error if an index is out of range
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs


def _gathered_bytes(w: Tensor, slots: list[Tensor], ids: Tensor) -> int:
    return ids.numel() * w.shape[1] * (w.element_size() + 4 * len(slots))


@operator(
    "perturb_rows",
    traits=Traits(all_points=True, looks_up=True),
    cost=Cost(noise=lambda result: result[0].numel(), scratch=_gathered_bytes),
)
def perturb_rows(
    w: Tensor,
    slots: list[Tensor],
    ids: Tensor,
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[(w + coefficients[p] · z)[ids] for p]``, each ``[*ids.shape, columns]``.

    Args:
        ids: int64 or int32 of any shape; an id out of range has the effect described in :func:`rows`.
    """
    # The kernel is compiled for contiguous int64; ids of rows with one token may be a view with gaps.
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    noise = NoiseArgs(slots, key, scale, scalars).rows(flat)
    out = kernels.get(kernel_key).perturbation.rows(w.index_select(0, flat), noise, coefficients, flat)
    return [o.view(*ids.shape, w.shape[1]) for o in out]


@perturb_rows.register_fake
def _(w, slots, ids, key, scale, scalars, coefficients, kernel_key):
    return [w.new_empty((*ids.shape, w.shape[1])) for _ in range(coefficients.shape[0])]


@operator("rows", traits=Traits(looks_up=True), cost=Cost())
def rows(w: Tensor, ids: Tensor) -> Tensor:
    """Return ``w[ids]``. An id out of range raises ``IndexError`` on a CPU and a device-side assertion on a GPU."""
    return w.index_select(0, ids.reshape(-1)).view(*ids.shape, *w.shape[1:])


@rows.register_fake
def _(w, ids):
    return w.new_empty((*ids.shape, *w.shape[1:]))


@rows.register_vmap
def _(info, in_dims, w, ids):
    """Map over examples with one look-up; if each example has its own table, it reads the concatenated tables."""
    w_dim, ids_dim = in_dims
    if ids_dim is None:
        ids, ids_dim = ids.expand(info.batch_size, *ids.shape), 0
    ids = ids.movedim(ids_dim, 0)
    if w_dim is None:
        return rows(w, ids), 0
    w = w.movedim(w_dim, 0)
    first = torch.arange(ids.shape[0], device=ids.device) * w.shape[1]
    return rows(w.flatten(0, 1), ids + first.view(-1, *[1] * (ids.ndim - 1))), 0


@operator("index_error", traits=Traits(), cost=Cost())
def index_error(index: Tensor, size: int, wraps: bool, ignored: int | None) -> Tensor:
    """Check an index and return a 0-d zero of its dtype.

    The caller adds the zero to the index, so that the look-up cannot run before the check.

    Args:
        index: int64 or int32 of any shape.
        size: number of entries of the table.
        wraps: whether negative indices count from the end.
        ignored: an index that is allowed although it is not in the table.

    Raises:
        IndexError: an index is out of range.
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
