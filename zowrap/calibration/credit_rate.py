"""Choose the learning rate of residual credit: the best step on examples that the step was not made from.

Let G be the credit of one batch and f the loss of another. Along the line θ − t·G/rms(G),

    f(t) ≈ f(0) − s t + ½ c t²

and s and c follow from f at −t, 0 and t. The best single step is t* = E s / E c, with means over pairs of batches. It
is measured at the size of a step, because for larger steps a loss may grow faster than its curvature at θ says: t is
such that the loss would fall by the share :data:`TRIED` if G were its gradient. A run begins with t*, but with
no step along which the slope alone would take more than the share :data:`LARGEST` of the loss.

The weights are moved for the evaluations, and put back bit for bit (:mod:`zowrap.model.along`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zowrap.errors import Option, ZOError, not_finite
from zowrap.model.along import count_moving, losses_along, takes_scale_free_steps
from zowrap.model.zo_model import ZOModel

PAIRS = 4  # of batches: one that gives the credit, one that is evaluated
TRIED = 0.1
# Where the loss curves down along G, or hardly up at t. The story model did well with 15 % at a rate that falls, and
# badly with 30 % at a constant one; MiniLM on TREC would bear twice what it gets (docs/fewer-forwards.md).
LARGEST = 0.15


@dataclass(frozen=True)
class CreditRate:
    """A choice of η for residual credit, and the measurements behind it.

    Attributes:
        lr: η.
        steps: the planned number of steps.
        loss: the mean loss at θ over the batches evaluated.
        slope, curvature: s and c, means over the pairs.
        step: the root mean square of a step at this rate.
        forwards: the number of forward passes made, each of the program that gives credit.
    """

    lr: float
    steps: int
    loss: float
    slope: float
    curvature: float
    step: float
    forwards: int

    def __str__(self) -> str:
        gain = self.step * (self.slope - max(self.curvature, 0.0) * self.step / 2)
        return (
            f"lr {self.lr:.2e} chosen with {self.forwards} forwards: a step moves a weight by about {self.step:.2g}, "
            f"and the loss of the next examples, {self.loss:.3g}, by about {-gain:.2g}"
        )

    def record(self) -> dict[str, Any]:
        """The choice as JSON types; ``CreditRate(**record)`` restores it."""
        return asdict(self)


def choose_credit_rate(
    zm: ZOModel, batches: Iterable[Any], steps: int, watch: Callable[[int, int], None] | None = None
) -> CreditRate:
    """Choose the learning rate of a run with residual credit; see :func:`zowrap.tune_lr`.

    Raises:
        ZOError: there is no batch, a loss is not finite, or no step along the credit lowers the loss.
    """
    groups: list[list[Any]] = [
        [batch] if isinstance(batch, Mapping) else list(batch)
        for batch, _ in zip(batches, range(PAIRS + 1), strict=False)
    ]
    if not groups:
        raise ZOError(Option("lr", "auto"), " needs at least one training batch")
    losses, slopes, curvatures, sizes, forwards = [], [], [], [], 0.0
    count = max(len(groups) - 1, 1)
    for pair in range(count):
        if watch is not None:
            watch(3 * pair, 3 * count)
        zm.discard()
        for batch in groups[pair]:
            zm.accumulate(**batch)
        measured, g = zm.peek()
        if not bool(torch.isfinite(measured).all() & torch.isfinite(g).all()):
            raise not_finite(measured)
        if not float(g):
            raise ZOError(Option("lr", "auto"), " found nothing to go by: the loss of a batch has no gradient")
        slope_of_gradient = float(g) * count_moving(zm)  # what the slope would be if G were the gradient
        t = TRIED * float(measured.mean()) / slope_of_gradient
        held = groups[(pair + 1) % len(groups)]
        before, after, behind = losses_along(zm, held, (0.0, t, -t))
        zm.discard()
        losses.append(before)
        sizes.append(float(g))
        slopes.append((behind - after) / (2 * t))
        curvatures.append((after + behind - 2 * before) / t**2)
        forwards += (1 + zm.schedule.sequential) * len(groups[pair]) + 3 * len(held)
    loss, slope, curvature = (sum(each) / count for each in (losses, slopes, curvatures))
    if not math.isfinite(loss + slope + curvature):
        raise ZOError(Option("lr", "auto"), " met a loss that is not finite near the weights: give lr a number")
    if slope <= 0:
        raise ZOError(
            Option("lr", "auto"),
            " found no step along the residual credit that lowers the loss on other examples: use more examples a "
            "batch, or ",
            Option("estimator", "central"),
        )
    best = slope / curvature if curvature > 0 else math.inf
    step = min(best, LARGEST * loss / slope)
    size = math.sqrt(sum(g * g for g in sizes) / count)
    # A rule that does not depend on the loss's scale makes a first step of size η; another one of size η g.
    lr = float(f"{step if takes_scale_free_steps(zm) else step / size:.3g}")
    return CreditRate(lr, steps, loss, slope, curvature, step, round(forwards))
