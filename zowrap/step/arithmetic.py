"""The arithmetic of one step around a rule: pure functions that both engines run.

The eager engine calls them on whole tensors; the compiled engine traces them, with the noise, into fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zowrap.numerics import rounding
from zowrap.numerics.dtypes import at_least_float32, is_16_bit
from zowrap.rules.base import MASTER, Probe, Rule, Scalars, combine
from zowrap.rules.estimators import mean_loss


class Conclusion(NamedTuple):
    """The conclusion of a step from its losses.

    Attributes:
        state: new scalar state of the rule (the old one if the step is skipped).
        coefficients: what ``leaf`` needs; ``coefficients["g"]`` is float32 ``[directions]``.
        apply: 0-d bool: False skips the step (a loss or a projected gradient is not finite).
        projected_grad: float32 ``[directions]``.
        loss: 0-d float32.
    """

    state: Scalars
    coefficients: Scalars
    apply: Tensor
    projected_grad: Tensor
    loss: Tensor


def conclude(
    rule: Rule,
    project: Callable[[Tensor, Tensor], Tensor],
    state: Scalars,
    losses: Tensor,
    hyper: Scalars,
    step: Tensor,
    projected_grad: Tensor | None = None,
    weights: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Conclusion:
    """Losses → projected gradients → the rule's coefficients, or a skip.

    Args:
        losses: float32 ``[points]``; for a population ``[points, examples]``.
        hyper: 0-d float32 ``lr``, ``eps``, ``weight_decay``.
        step: 0-d float32, steps done before this one.
        projected_grad: overrides the estimate (replaying known projected gradients).
        weights: float32 ``[directions]`` that add up to 1; by default all the same.
        candidates: float32, losses at the points that the rule asked for beside its probes.
    """
    g = project(losses, hyper["eps"]) if projected_grad is None else projected_grad
    if weights is None:
        weights = torch.full_like(g, 1 / g.shape[0])
    if candidates is None:
        candidates = losses.new_zeros(0)
    new_state, coefficients = rule.scalars(state, Probe(losses, g, step, weights, candidates), hyper)
    coefficients = {name: value.float() for name, value in coefficients.items()}  # a rule's flags and counts, too
    apply = torch.isfinite(losses).all() & torch.isfinite(g).all() & torch.isfinite(candidates).all()
    for value in (*new_state.values(), *coefficients.values()):
        apply = apply & torch.isfinite(value).all()
    kept = {name: torch.where(apply, new_state[name], state[name]) for name in state}
    return Conclusion(kept, coefficients, apply, g, mean_loss(losses if losses.ndim == 1 else losses @ weights))


def update_leaf(
    rule: Rule,
    w: Tensor,
    directions: Sequence[Tensor],
    slots: Scalars,
    coefficients: Scalars,
    hyper: Scalars,
    apply: Tensor,
    bits: Tensor | None,
    decay: bool,
) -> tuple[Tensor, Scalars]:
    """One parameter's update, elementwise.

    Where the slots hold a float32 master, it is what the rule moves, and the weight is its nearest 16-bit number. A
    weight that is not, because it was written from elsewhere, becomes its own master.

    Args:
        w: the weights, any float dtype.
        directions: z_i, float32, ``w``'s shape each.
        slots: the rule's element state, float32.
        apply: 0-d bool: False leaves ``w`` and the slots bitwise as they were.
        bits: int32 random bits for stochastic rounding of 16-bit weights, else ``None``.
        decay: whether decoupled weight decay applies to this parameter.

    Returns:
        New weights in ``w``'s dtype, and new slots.
    """
    g = directions if rule.leaf_takes_directions else combine(coefficients["g"], directions)
    value, master = at_least_float32(w), slots.get(MASTER)
    if master is not None:
        value = torch.where(rounding.round_to_nearest(master, w.dtype) == value, master, value)
    if decay:
        value = value * (1 - hyper["lr"] * hyper["weight_decay"])
    own = {name: slot for name, slot in slots.items() if name != MASTER}
    value, new_slots = rule.leaf(value, g, own, coefficients, hyper)
    if master is not None:
        new_slots = {**new_slots, MASTER: value}
        largest = torch.finfo(w.dtype).max
        rounded = rounding.round_to_nearest(value, w.dtype).clamp(-largest, largest).to(w.dtype)
    else:
        rounded = value.to(w.dtype) if bits is None else rounding.round_stochastically(value, bits, w.dtype)
    kept = {name: torch.where(apply, new_slots[name].to(slots[name].dtype), slots[name]) for name in slots}
    return torch.where(apply, rounded, w), kept


# Elements summed at once: the summands are a temporary of this size, not of the parameter's. On a GPU every piece is
# a few launches, and pieces of 4 MiB would be 25 000 of them at 13 billion weights.
REDUCE_ELEMENTS, REDUCE_ELEMENTS_GPU = 1 << 20, 1 << 24


def sum_slots(reduce: Callable[[Scalars], Scalars], slots: Scalars) -> Scalars:
    """Sums over one parameter of the summands that a rule's ``reduce`` makes of its slots: 0-d float64 each."""
    size = REDUCE_ELEMENTS_GPU if next(iter(slots.values())).is_cuda else REDUCE_ELEMENTS
    parts = zip(*(slot.reshape(-1).split(size) for slot in slots.values()), strict=True)
    runs = [_sum_in_float64(reduce(dict(zip(slots, part, strict=True)))) for part in parts]
    return {name: torch.stack([run[name] for run in runs]).sum() for name in runs[0]}


def _sum_in_float64(summands: Scalars) -> Scalars:
    return {name: value.sum(dtype=torch.float64) for name, value in summands.items()}


def perturb_weight(w: Tensor, z: Tensor, coefficient: Tensor) -> Tensor:
    """w + coefficient · z, at least in float32, in ``w``'s dtype; ``coefficient`` is ±ε as a 0-d float32 tensor."""
    return (at_least_float32(w) + coefficient * z).to(w.dtype)


def evaluated_direction(w: Tensor, z: Tensor, eps: Tensor, other: float | None) -> Tensor:
    """The direction that an update takes: z as drawn, or of a 16-bit weight the one between its points as evaluated.

        ẑ = [round(w + εz) − round(w + other·εz)] / (1 − other)ε

    A loss is only ever seen along ẑ: where εz is below half a unit in the last place it is 0, and z says nothing.

    Args:
        other: coefficient of the second point, −1 for central differences and 0 for forward ones; None takes z.
    """
    if other is None or not is_16_bit(w):
        return z
    value, step = w.float(), eps * z
    plus, minus = (rounding.round_to_nearest(value + sign * step, w.dtype) for sign in (1.0, other))
    return (plus - minus) / ((1 - other) * eps)
