"""Sparse-MeZO perturbs and updates only the small weights of each parameter.

    mask = |θ| ≤ h,   z = mask · u,   θ ← θ − η g z

with h the (1 − sparsity) quantile of |θ| within each parameter. The mask comes from the unperturbed θ, so it is the
same at every point of a step and in the update. Source: 2402.15751, Algorithm 1. h is computed afresh at every step;
the paper's code computes it once, from the initial weights (``refresh=0``), so that weights which grow beyond it drop
out for good and a parameter that starts at zero stops moving after its first step.

Sparsity is a property of the direction, so other rules can use it too: ``direction="sparse(0.75)"``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from zowrap.checks import check_fraction, check_positive
from zowrap.errors import Option, ZOError
from zowrap.rules.base import Choice, Rule, Scalars, Slot, identity, known
from zowrap.rules.zo_sgd import zo_sgd


@known
def sparse_mezo(*, lr: float = 1e-6, sparsity: float = 0.75, refresh: int = 1) -> Rule:
    """MeZO on the smallest weights of each parameter only.

    Args:
        lr: η. 1e-6 as for ``zo_sgd``; the paper finds that sparse directions bear larger ones.
        sparsity: in [0, 1), the share of each parameter that does not move. 0.75 is the paper's best on most tasks.
        refresh: the number of steps between computations of the threshold; 0 keeps the first one. With 1 the mask
            always fits the current weights, at the cost of a selection over all weights; with small steps 100 works
            as well.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("sparse_mezo", lr=lr)
    along = with_sparse_directions(zo_sgd(lr=lr), sparsity=sparsity, refresh=refresh, name="sparse_mezo")
    return dataclasses.replace(along, name="sparse_mezo", hyper={"sparsity": sparsity, "refresh": refresh})


@known
def with_sparse_directions(
    rule: Rule, *, sparsity: float = 0.75, refresh: int = 1, name: str = "direction 'sparse'"
) -> Rule:
    """``rule`` with directions that are zero on the large weights.

    Args:
        sparsity, refresh: see :func:`sparse_mezo`.
        name: the subject of error messages.

    Raises:
        ZOError: a value outside its range, or a rule that shapes its directions itself.
    """
    check_sparse(name, sparsity, refresh)
    if rule.direction is not identity:
        raise ZOError(f"{rule.name} shapes its directions itself, so it cannot use ", Option("direction", "sparse"))

    def check(choice: Choice) -> None:
        if choice.direction in ("sphere", "unit_sphere"):
            raise ZOError(
                f"{name} would drop elements of a sphere and so change its length: use ",
                Option("direction", "gaussian"),
            )
        rule.check(choice)

    def thresholds(w: Tensor, step: int) -> Scalars | None:
        if step and not (refresh and step % refresh == 0):
            return None
        return {"threshold": magnitude_threshold(w, 1 - sparsity)}

    def direction(u: Tensor, w: Tensor, slots: Scalars, s: Scalars) -> Tensor:
        return torch.where(w.abs() <= slots["threshold"], u, 0.0)

    return dataclasses.replace(
        rule,
        slots={**rule.slots, "threshold": Slot(kind="parameter")},
        check=check,
        direction=direction,
        direction_slots=("threshold",),
        refresh=thresholds,
    )


def check_sparse(name: str, sparsity: float, refresh: int) -> None:
    """Raise :class:`ZOError` for a value outside its range."""
    check_fraction(name, sparsity=sparsity)
    if not isinstance(refresh, int) or isinstance(refresh, bool) or refresh < 0:
        raise ZOError(Option("refresh", rule=name), f" must be a whole number of steps, 0 or more, got {refresh!r}")


def magnitude_threshold(w: Tensor, share: float) -> Tensor:
    """The largest |w| among the smallest ``share`` of the elements of ``w``: 0-d float32, exact."""
    if not w.numel():
        return torch.zeros((), device=w.device)
    count = max(1, math.ceil(share * w.numel() - 1e-9))
    return torch.kthvalue(w.reshape(-1).abs().float(), min(count, w.numel())).values
