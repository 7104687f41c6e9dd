"""Check that steps of residual credit descend, and shorten those that go too far.

Residual credit leaves out what later blocks do with a contribution, so a step along it may raise the loss, and a rate
that was right at the start may be too high later. Before every k-th step the loss f of its own batch is evaluated on
both sides of θ, along the direction z = G/rms(G) of the step and as far away as the step goes:

    f(θ − t z) ≈ f(θ) − s t + ½ c t²

* f(θ − t z) ≥ f(θ): the step goes too far. It is tried again at the lowest point s/c, or much shorter where s and c say
  none.
* s/c < t: the rate is lowered to reach the lowest point; otherwise a rate that was lowered grows again, up to fourfold
  and to the one that was set.
* s ≤ 0 however short the step: the rate is halved, and after :data:`PATIENCE` such checks in a row the run has
  stalled.

A batch's own lowest point is further away than that of the data, so this keeps a run from diverging, and does not
choose its rate: see :mod:`zowrap.calibration.credit_rate`. A check costs two forwards, and two without the head where
memory is sequential.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

from zowrap.errors import ZOWarning

# Steps between checks: two evaluations in 32 steps, each with a move of the weights, are about a tenth more.
EVERY = 32
PATIENCE = 3  # checks in a row: one alone may be of a batch that has nothing left to learn
TRIES, SHORTER = 5, 0.1  # times that a step is tried, and how much shorter where no parabola says it
FARTHEST = 4.0  # in steps: how far a parabola is believed
SEEN = 1e-6  # of the loss: a smaller difference is rounding, of float32 losses


class Check(NamedTuple):
    """What a check found: the loss at θ, slope s, curvature c and the length t of the step, all along z."""

    loss: float
    slope: float
    curvature: float
    step: float

    @property
    def lowest(self) -> float:
        """Where a parabola that falls is lowest, at most :data:`FARTHEST` steps away."""
        farthest = FARTHEST * self.step
        return min(self.slope / self.curvature, farthest) if self.curvature > 0 else farthest


class Descent:
    """The checks of a run.

    Attributes:
        every: steps between checks, by default :data:`EVERY`; 0 makes none.
        factor: what the rate is multiplied by.
        failed: checks in a row that found no descent.
        last: what the last check found.
        evaluations: of a batch's loss, by all checks.
    """

    def __init__(self, every: int | None) -> None:
        self.every = EVERY if every is None else every
        self.factor, self.failed = 1.0, 0
        self.last: Check | None = None
        self.evaluations = 0

    def is_due(self, step: int) -> bool:
        """Whether a check is due before this step."""
        return self.every > 0 and step % self.every == 0

    @property
    def stalled(self) -> bool:
        """Whether the run no longer descends."""
        return self.failed >= PATIENCE

    def check(self, step: int, loss: float, unit: float, evaluate: Callable[[list[float]], list[float]]) -> None:
        """Measure along the credit of the step that is about to be made, and set :attr:`factor`.

        Args:
            step: its number.
            loss: at θ.
            unit: how far the step goes at the rate that was set.
            evaluate: the losses of the step's batch at θ − t z, for some t.
        """
        if not math.isfinite(loss + unit) or not unit:
            return  # the step is skipped, or moves nothing
        factor, climbs = self.factor, False
        for _ in range(TRIES):
            t = unit * factor
            after, behind = evaluate([t, -t])
            self.evaluations += 2
            self.last = found = Check(loss, (behind - after) / (2 * t), (after + behind - 2 * loss) / t**2, t)
            finite = math.isfinite(after + behind)
            if finite and abs(behind - after) < SEEN * abs(loss):
                if factor == self.factor:  # too short to see anything: as a whole, or what was left of it
                    self.factor = min(1.0, FARTHEST * factor)
                    return
                break
            climbs = finite and found.slope <= 0
            if finite and not climbs and after < loss:
                self.failed = 0
                # Down to the lowest point of the batch, or up again to the rate that was set.
                self.factor = min(1.0, factor * found.lowest / t)
                return
            factor *= max(found.lowest / t, SHORTER) if finite and not climbs else SHORTER
        if not climbs:
            self.factor = factor
            return
        self.failed, self.factor = self.failed + 1, self.factor / 2
        if self.failed == PATIENCE:
            warnings.warn(
                f"at step {step}, residual credit no longer lowers the loss of its own batch "
                f"({PATIENCE} checks in a row, {self.every} steps apart): estimator 'central' or 'population' can "
                "go on from these weights",
                ZOWarning,
                stacklevel=5,
            )
