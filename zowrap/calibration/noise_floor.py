"""Measure how small ε may be when activations are rounded to 8 bits.

Each quantised layer rounds its inputs, so on a fine scale the loss is a step function: f(θ + εz) − f(θ − εz) is the sum
of 2εs, with the slope s, and a rounding part n that does not shrink with ε. At an ε a hundred times smaller only n is
left, so s follows from the difference at ε itself. At 2εs = n, the slope and the rounding contribute equally.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from zowrap.checks import check_positive
from zowrap.errors import Option, ZOError
from zowrap.step.step_directions import StepDirections

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel

ROUNDING_RATIO = 100.0  # rounding is measured at an ε this much smaller
# Signs are compared with those at an ε this much smaller, because curvature, which grows with ε, and rounding, which
# matters more at a smaller ε, each change some of them. A larger ε would be no comparison: ten times the default of
# scales, 0.1, multiplies them by a factor of e.
COMPARED_RATIO = 3.0


@dataclass(frozen=True)
class NoiseFloor:
    """The result of :func:`noise_floor`, in root mean squares over directions.

    Attributes:
        eps: ε.
        slope: s, the slope of the loss along a direction; NaN if 2εs is not above n, for then it is only chance.
        rounding: n, the part of the difference of two losses that is due to rounding.
        floor: n / 2s, the ε at which slope and rounding contribute equally; NaN without a slope.
        agreement: the share of directions on which the differences at ``eps`` and ``against`` have the same sign.
        against: the other ε.
    """

    eps: float
    slope: float
    rounding: float
    floor: float
    agreement: float
    against: float

    @property
    def hidden(self) -> bool:
        """Whether rounding hides the slope of the loss at ε."""
        return math.isnan(self.floor) and self.rounding > 0

    def record(self) -> dict[str, float | None]:
        """The result as JSON types, with None for NaN."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@torch.no_grad()
def noise_floor(
    zm: ZOModel, batch: dict[str, Any], eps: float | None = None, directions: int = 8, against: float | None = None
) -> NoiseFloor:
    """Measure how much of a difference of losses at ε is rounding, with 6 forwards per direction; nothing moves.

    Args:
        eps: by default the model's own.
        directions: the number of directions to average over; they differ from those of all steps.
        against: the ε whose signs are compared; by default a third of ``eps``.

    Raises:
        ZOError: the model rounds no activations, it evaluates a population, or a number is not positive.
    """
    if zm.job.quant_mode is None or not zm.job.quant_mode.rounds:
        raise ZOError("no layer of this model rounds its activations to 8 bits, so there is no noise floor to measure")
    if directions < 1:
        raise ZOError(f"directions must be at least 1, got {directions}")
    if zm.job.estimator.per_example:
        raise ZOError(
            "noise_floor needs the loss of a whole batch: wrap the model with ", Option("estimator", "central")
        )
    eps = zm.eps if eps is None else eps
    against = eps / COMPARED_RATIO if against is None else against
    check_positive("noise_floor", eps=eps, against=against)
    inputs, job = zm.prepare(dict(batch)), zm.job
    found: dict[float, list[float]] = {eps / ROUNDING_RATIO: [], eps: [], against: []}
    for number in range(directions):
        drawn = StepDirections(job, zm.engine, zm.job.ids, zm.seed, -1 - number, block=number % len(job.blocks))
        signs = torch.tensor([1.0, -1.0], device=job.device)
        for size, differences in found.items():
            sums, weights = zm.engine.losses(inputs, drawn.queries[0], signs * size)
            losses = sums.double().sum(-1) / weights.double().sum()
            differences.append(float(losses[0] - losses[1]))
        drawn.undo()
    rounding, whole = _rms(found[eps / ROUNDING_RATIO]), _rms(found[eps])
    slope, floor = estimate_slope_and_floor(whole, rounding, eps)
    same = [a * b > 0 for a, b in zip(found[eps], found[against], strict=True)]
    return NoiseFloor(eps, slope, rounding, floor, sum(same) / len(same), against)


def estimate_slope_and_floor(whole: float, rounding: float, eps: float) -> tuple[float, float]:
    """Estimate s and n / 2s from a difference of losses at ±ε and the rounding in it; NaN if 2εs is not above n."""
    along = math.sqrt(max(whole**2 - rounding**2, 0.0))
    if not along > rounding:
        return math.nan, math.nan
    return along / (2 * eps), rounding * eps / along


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
