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

from zowrap.errors import ZOError
from zowrap.streams import Streams

if TYPE_CHECKING:
    from zowrap.model import ZOModel

SMALLER = 100.0


@dataclass(frozen=True)
class NoiseFloor:
    """What :func:`noise_floor` measured, root mean squares over directions.

    Attributes:
        slope: s, of the loss along a direction; NaN where ε is below the floor by so much that nothing of it is seen.
        rounding: n, of the difference of two losses.
        floor: the ε at which both count the same, n / 2s.
        agreement: share of directions on which the sign at ε is that at 10 ε.
    """

    slope: float
    rounding: float
    floor: float
    agreement: float

    def record(self) -> dict[str, float | None]:
        """Ready for JSON: NaN as None."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@torch.no_grad()
def noise_floor(zm: ZOModel, batch: dict[str, Any], eps: float | None = None, directions: int = 8) -> NoiseFloor:
    """Measure how much of a difference of losses at ε is rounding; nothing moves. Costs 6 forwards a direction.

    Args:
        eps: by default the model's own.
        directions: other ones than those of any step.

    Raises:
        ZOError: a population, whose differences are each example's own.
    """
    if zm._estimator.per_example:
        raise ZOError("noise_floor looks at the loss of a whole batch: wrap the model with estimator='central'")
    eps = zm.eps if eps is None else eps
    inputs, job = zm._prepare(dict(batch)), zm._job
    found: dict[float, list[float]] = {eps / SMALLER: [], eps: [], 10 * eps: []}
    for number in range(directions):
        streams = Streams(job, zm._engine, zm._ids, zm.seed, -1 - number, block=number % len(job.blocks))
        signs = torch.tensor([1.0, -1.0], device=job.device)
        for size, differences in found.items():
            sums, weights = zm._engine.losses(inputs, streams.queries[0], signs * size)
            losses = sums.double().sum(-1) / weights.double().sum()
            differences.append(float(losses[0] - losses[1]))
        streams.undo()
    rounding, whole = _rms(found[eps / SMALLER]), _rms(found[eps])
    slope = math.sqrt(whole**2 - rounding**2) / (2 * eps) if whole > rounding else math.nan
    same = [a * b > 0 for a, b in zip(found[eps], found[10 * eps], strict=True)]
    return NoiseFloor(slope, rounding, rounding / (2 * slope), sum(same) / len(same))


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
