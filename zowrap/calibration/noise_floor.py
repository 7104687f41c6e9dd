"""How small ε may be when activations are rounded to 8 bit.

Each quantised layer rounds its inputs anew, so the loss is a step function at a fine scale: f(θ + εz) − f(θ − εz) holds
a part n that does not shrink with ε beside the part 2εs that the slope s gives. At an ε a hundred times smaller only n
is left; what ε itself shows beyond it is the slope. Where 2εs = n the rounding hides as much as the loss tells.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from zowrap.checks import check_positive
from zowrap.errors import ZOError
from zowrap.step.step_directions import Streams

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel

SMALLER = 100.0
# Signs are set against those at an ε this much smaller: curvature, which grows with ε, and rounding, which counts more
# the smaller ε is, both turn some. Ten times larger, the default of scales would be a factor of e.
AGAINST = 3.0


@dataclass(frozen=True)
class NoiseFloor:
    """What :func:`noise_floor` measured, root mean squares over directions.

    Attributes:
        eps: ε.
        slope: s, of the loss along a direction; NaN where 2εs is not above the rounding: both are chance then.
        rounding: n, of the difference of two losses.
        floor: the ε at which both count the same, n / 2s; NaN where there is no slope.
        agreement: share of directions on which the sign at ε is that at ``against``.
        against: another ε.
    """

    eps: float
    slope: float
    rounding: float
    floor: float
    agreement: float
    against: float

    @property
    def hidden(self) -> bool:
        """Whether the rounding hides what the loss does at ε."""
        return math.isnan(self.floor) and self.rounding > 0

    def record(self) -> dict[str, float | None]:
        """Ready for JSON: NaN as None."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@torch.no_grad()
def noise_floor(
    zm: ZOModel, batch: dict[str, Any], eps: float | None = None, directions: int = 8, against: float | None = None
) -> NoiseFloor:
    """Measure how much of a difference of losses at ε is rounding; nothing moves. Costs 6 forwards a direction.

    Args:
        eps: by default the model's own.
        directions: other ones than those of any step.
        against: the ε whose signs are compared with; by default a third of ``eps``.

    Raises:
        ZOError: a model that rounds no activations, a population, whose differences are each example's own, or a
            number that is not positive.
    """
    if zm._job.quant_mode is None or not zm._job.quant_mode.rounds:
        raise ZOError("no layer of this model rounds its activations to 8 bit: nothing puts a floor under eps")
    if directions < 1:
        raise ZOError(f"directions must be at least 1, got {directions}")
    if zm._estimator.per_example:
        raise ZOError("noise_floor looks at the loss of a whole batch: wrap the model with estimator='central'")
    eps = zm.eps if eps is None else eps
    against = eps / AGAINST if against is None else against
    check_positive("noise_floor", eps=eps, against=against)
    inputs, job = zm._prepare(dict(batch)), zm._job
    found: dict[float, list[float]] = {eps / SMALLER: [], eps: [], against: []}
    for number in range(directions):
        streams = Streams(job, zm._engine, zm._ids, zm.seed, -1 - number, block=number % len(job.blocks))
        signs = torch.tensor([1.0, -1.0], device=job.device)
        for size, differences in found.items():
            sums, weights = zm._engine.losses(inputs, streams.queries[0], signs * size)
            losses = sums.double().sum(-1) / weights.double().sum()
            differences.append(float(losses[0] - losses[1]))
        streams.undo()
    rounding, whole = _rms(found[eps / SMALLER]), _rms(found[eps])
    slope, floor = slope_and_floor(whole, rounding, eps)
    same = [a * b > 0 for a, b in zip(found[eps], found[against], strict=True)]
    return NoiseFloor(eps, slope, rounding, floor, sum(same) / len(same), against)


def slope_and_floor(whole: float, rounding: float, eps: float) -> tuple[float, float]:
    """s and n / 2s from a difference of losses at ±ε and the rounding in it; NaN where 2εs is not above n."""
    along = math.sqrt(max(whole**2 - rounding**2, 0.0))
    if not along > rounding:
        return math.nan, math.nan
    return along / (2 * eps), rounding * eps / along


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
