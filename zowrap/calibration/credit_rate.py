"""Choose the learning rate of residual credit: steps that end at the lowest point of their own batch.

Let G be the credit of a batch and f the loss of it. Along the line θ − t·G/rms(G),

    f(t) ≈ f(0) − s t + ½ c t²

and s and c follow from f at −t, 0 and t, for a t at which the loss would fall by the share :data:`TRIED` if G were its
gradient. A run begins with steps of t* = Σ s / Σ c over a few batches. Other examples would have shorter steps, but
these are what is best for the next step alone: where examples disagree, a rate that falls makes more of longer ones
(docs/fewer-forwards.md has the measurements). On the mean no
step changes a matrix by more than :data:`LARGEST` of its gain.

The weights are moved for the evaluations, and put back bit for bit (:mod:`zowrap.model.along`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zowrap.errors import Option, ZOError, not_finite
from zowrap.model.along import count_moving, losses_along, measure_first_step, measure_gain
from zowrap.model.zo_model import ZOModel

TRIED = 0.1
# Steps for each batch that is measured, and the most batches: three evaluations in 32 steps of 1.4 forwards or more,
# and the lowest points of batches differ by a factor of two.
STEPS_A_BATCH, MOST_BATCHES = 32, 4
# If the singular values of a matrix were equal, each would be ‖W‖/√(number of them). A step along one direction alone
# may be this share of that. The story model, whose examples agree, is best with 0.25 and bad with 0.5, although the
# lowest points of its batches are farther away; MiniLM's are nearer than 0.25.
LARGEST = 0.25
FARTHEST = 20.0  # in lengths of what was tried: how far a parabola is believed; MiniLM's lowest points are at 5 to 15


@dataclass(frozen=True)
class CreditRate:
    """A choice of η for residual credit, and the measurements behind it.

    Attributes:
        lr: η.
        steps: the planned number of steps.
        loss: the mean loss at θ over the batches evaluated.
        slope, curvature: s and c, means over the batches.
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
            f"and the loss of its own batch, {self.loss:.3g}, by about {-gain:.2g}"
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
    wanted = max(1, min(MOST_BATCHES, steps // STEPS_A_BATCH))
    losses, slopes, curvatures, tried, lengths, gain, forwards = [], [], [], [], [], math.inf, 0
    for batch, number in zip(batches, range(wanted), strict=False):
        if watch is not None:
            watch(3 * number, 3 * wanted)
        group: list[Any] = [batch] if isinstance(batch, Mapping) else list(batch)
        zm.discard()
        for part in group:
            zm.accumulate(**part)
        measured, g = zm.peek()
        loss = float(measured.mean())
        if not bool(torch.isfinite(measured).all() & torch.isfinite(g).all()):
            raise not_finite(measured)
        if not float(g):
            raise ZOError(Option("lr", "auto"), " found nothing to go by: the loss of a batch has no gradient")
        # Where the loss would be lower by that share if G were exact.
        t = TRIED * (abs(loss) or 1.0) / (float(g) * count_moving(zm))
        after, behind = losses_along(zm, group, (t, -t))
        losses.append(loss)
        tried.append(t)
        lengths.append(measure_first_step(zm))
        slopes.append((behind - after) / (2 * t))
        curvatures.append((after + behind - 2 * loss) / t**2)
        gain = measure_gain(zm)
        # A step along weights that are moved on the way makes a second forward for each.
        forwards += 3 * len(group) * (2 if zm.schedule.sequential else 1)
    zm.discard()
    if not losses:
        raise ZOError(Option("lr", "auto"), " needs at least one training batch")
    loss, slope, curvature = (sum(each) / len(each) for each in (losses, slopes, curvatures))
    if not math.isfinite(loss + slope + curvature):
        raise ZOError(Option("lr", "auto"), " met a loss that is not finite near the weights: give lr a number")
    if slope <= 0:
        raise ZOError(
            Option("lr", "auto"),
            " found no step along the residual credit that lowers the loss of its own batch: use ",
            Option("estimator", "central"),
        )
    lowest = slope / curvature if curvature > 0 else math.inf
    step = min(lowest, LARGEST * gain, FARTHEST * sum(tried) / len(tried))
    lr = float(f"{step / (sum(lengths) / len(lengths)):.3g}")
    return CreditRate(lr, steps, loss, slope, curvature, step, forwards)
