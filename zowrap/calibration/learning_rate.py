"""``lr="auto"``: a learning rate from a few forwards, before the first step, for any rule.

A step of size η moves along the descent direction, and, because one direction tells so little of it, mostly at
random: after T steps the weights have wandered σ_T away, measured in units of the perturbation. A run may wander as far
as the loss looks much the same from there. What a perturbation of that size changes beside the slope,

    F(σ) = E_z | ½ f(θ + σz) + ½ f(θ − σz) − f(θ) |

forwards measure without a step. η is chosen so that the wandering of the whole run would change the loss of a batch by
a fixed share, F(σ_T) = SHARE · f(θ). Two measurements answer that, and neither writes a weight:

1. σ* with F(σ*) = SHARE · f(θ), by forwards at growing ε along directions of the run, on batches of the training
   data (:func:`survey`). The same forwards give the size of the projected gradients.
2. η with σ_T(η) = σ*, by rehearsing the rule with projected gradients of that size
(:mod:`zowrap.calibration.simulation`).

F is measured where the run is going to be, not extrapolated from a curvature at θ; what moves (all weights, adapters,
one block a step), the law of the directions and the weights' dtype are in it because the run's own directions are
evaluated. What the rule makes of a projected gradient is in the rehearsal. docs/learning-rate.md has the measurements.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zowrap import machine
from zowrap.calibration.simulation import Rehearsal
from zowrap.errors import ZOError, not_finite
from zowrap.model.zo_model import ZOModel

SHARE = 0.08
# Evaluations of a step's points that the survey may make: this share of the steps planned, between two bounds. Four
# are needed to find the scale; a dozen more, because the change along one direction may be several times the mean where
# few directions of the loss are steep.
EVALUATIONS, LEAST, MOST = 0.05, 16, 40
REACH = 4.0  # times ε: from there on the loss is no longer straight and projected gradients come out smaller
GROWTH = math.sqrt(10.0)  # of ε, while σ* is looked for
LEVELS = 12  # half decades tried: from ε = 1e-3, weights of size 1000
OUTLIER = 10.0  # times the target: how much one direction may count in the mean
NEAR = 3.5  # factor by which σ may lie below a sample's own for F ∝ σ² to be good enough; above, any
REHEARSALS = 8  # at most; two where the distance is proportional to η


@dataclass(frozen=True)
class LearningRate:
    """A choice of η, and what it was made from.

    Attributes:
        lr: η.
        steps: steps planned.
        loss: mean loss at θ over the batches that were used.
        projected_grad: root mean square of the projected gradients, and the standard error of the mean on top.
        sigma: σ*, the ε at which a perturbation changes the loss by ``change`` beside the slope.
        change: the change of the loss that was allowed.
        forwards: forward passes made.
    """

    lr: float
    steps: int
    loss: float
    projected_grad: float
    sigma: float
    change: float
    forwards: int

    def __str__(self) -> str:
        return (
            f"lr {self.lr:.2e} chosen for {self.steps} steps with {self.forwards} forwards: a perturbation of "
            f"{self.sigma:.2g} changes the loss of {self.loss:.3g} by {self.change:.2g}, and at this rate the noise "
            f"of the steps adds up to that by the end (|projected gradient| {self.projected_grad:.3g})"
        )

    def record(self) -> dict[str, Any]:
        """Ready for JSON; ``LearningRate(**record)`` restores it."""
        return asdict(self)


def tune_lr(
    zm: ZOModel,
    batches: Iterable[Any],
    steps: int,
    *,
    schedule: Callable[[int], float] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> LearningRate:
    """Choose the learning rate of a run that is about to begin, and set ``zm.lr`` to it.

    Weights are only read; the rule's state, step and ε are afterwards what they were.

    Args:
        zm: the wrapped model, before its first step.
        batches: training batches as ``zm.step(**batch)`` takes them, or lists of the micro-batches of one step. As
            many are taken as are used, at most 20; fewer are used again.
        steps: steps planned.
        schedule: ``schedule(t)``, step t's rate in units of η; constant by default.
        watch: called before each evaluation with the number made and the most there will be.

    Returns:
        The choice; printed, it is a sentence that says why.

    Raises:
        ZOError: the model has moved already, there is no batch, the loss is not finite, or nothing that moves
            changes it.
    """
    if zm.step_count:
        raise ZOError(f"lr='auto' is chosen before the first step; this model has made {zm.step_count}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ZOError(f"steps must be a whole number from 1, got {steps!r}")
    if isinstance(batches, Mapping):
        raise ZOError("tune_lr takes several batches, each a dictionary: a list of them, or a loader")
    if not any(point.coefficient for point in zm.points):
        raise ZOError("lr='auto' needs losses away from the weights, and this estimator takes none: give lr a number")
    with unmoved(zm):
        found = survey(zm, batches, max(LEAST, min(MOST, round(EVALUATIONS * steps))), watch)
    if not found.projected_grad or not found.change:
        raise ZOError(
            f"lr='auto' found nothing to go by: the loss of {found.loss:.4g} is the same on both sides of every "
            "direction tried (a larger eps may tell them apart), or give lr a number"
        )
    rehearsal = Rehearsal(zm, found.projected_grad, 2 * found.change / found.sigma**2, found.rows)
    lr = zm.rule.lr
    for _ in range(REHEARSALS):  # the distance is proportional to η, or nearly so
        ratio = found.sigma / rehearsal.distance(lr, steps, schedule or (lambda t: 1.0))
        lr *= ratio
        if abs(math.log(ratio)) < 0.03:
            break
    zm.lr = lr = float(f"{lr:.3g}")
    return LearningRate(lr, steps, found.loss, found.projected_grad, found.sigma, found.change, found.forwards)


@contextmanager
def unmoved(zm: ZOModel) -> Iterator[None]:
    """Afterwards the rule's state, step and ε are what they were, and torch's generators stand where they stood."""
    state, device = zm.state_dict(), zm._job.device
    kept = machine.rng_states(device)
    try:
        yield
    finally:
        machine.restore_rng(device, kept)
        # The form of the loss and the schedule were found on the way: they stay.
        found = {"loss": zm.loss_module.form, **zm._schedule.record()}
        zm.load_state_dict({**state, **found, "lr": zm.rule.lr})
        zm._set(lr=state["lr"])  # which may not be chosen yet: no state to load


@dataclass
class Survey:
    """What forwards around θ say; fields as in :class:`LearningRate`.

    Attributes:
        rows: directions of one step that are a single example's: the examples of a batch for a population, else 1.
    """

    loss: float
    projected_grad: float
    sigma: float
    change: float
    forwards: int
    rows: int


@dataclass
class _Place:
    """A training batch, and what the points of step ``step`` gave there at the run's own ε."""

    step: int
    batches: list[Mapping[str, Any]]
    losses: Tensor
    projected_grad: Tensor


class _Surveyor:
    """Evaluates points of steps that are never made.

    Attributes:
        made, forwards: evaluations of a step's points, and forward passes, so far.
        places: the batches used so far.
        gradients: projected gradients, float32, of every direction used so far.
    """

    def __init__(
        self, zm: ZOModel, batches: Iterable[Any], most: int, watch: Callable[[int, int], None] | None
    ) -> None:
        self.zm, self.most, self.watch = zm, most, watch
        self.eps = zm.eps
        self.made = self.forwards = 0
        self.places: list[_Place] = []
        self.gradients: list[Tensor] = []
        self._stream = iter(batches)
        self._seen: list[list[Mapping[str, Any]]] = []
        balance: dict[int, float] = {}
        for point in zm.points:
            balance[point.direction] = balance.get(point.direction, 0.0) + point.coefficient
        # Two-sided points lose the slope by themselves: each evaluation may then take a direction of its own, which
        # tells more of the projected gradients. One-sided ones need the slope along the same direction.
        self._two_sided = not any(balance.values())

    def evaluate(self, step: int, batches: list[Mapping[str, Any]], eps: float) -> tuple[Tensor, Tensor]:
        """Losses and projected gradients of a step at some ε."""
        if self.watch is not None:
            self.watch(self.made, self.most)
        zm = self.zm
        zm.step_count, zm.eps = step, eps
        zm.discard()
        for batch in batches:
            zm.accumulate(**batch)
        losses, g = zm.peek()
        zm.discard()
        if eps < REACH * self.eps:
            self.gradients.append(g.reshape(-1))
        self.made += 1
        self.forwards += len(zm.points) * len(batches)
        return losses, g

    def next_place(self) -> _Place:
        """The next batch, evaluated at ε."""
        batch = next(self._stream, None)
        if batch is not None:
            self._seen.append([batch] if isinstance(batch, Mapping) else list(batch))
        if not self._seen:
            raise ZOError("lr='auto' is chosen from training batches, and there is none")
        batches, step = self._seen[len(self.places) % len(self._seen)], self.made
        losses, g = self.evaluate(step, batches, self.eps)
        if not bool(torch.isfinite(losses).all() & torch.isfinite(g).all()):
            raise not_finite(losses)
        self.places.append(_Place(step, batches, losses, g))
        return self.places[-1]

    def change(self, place: _Place, sigma: float) -> float:
        """F(σ) on the place's batch, mean over the step's directions; infinite where the loss is not finite."""
        step = self.made if self._two_sided else place.step
        losses, _ = self.evaluate(step, place.batches, sigma)
        changes: dict[int, list[Tensor]] = {}
        for i, point in enumerate(self.zm.points):
            if point.coefficient:
                change = (losses[i] - place.losses[i]).double().mean()
                if not self._two_sided:
                    change -= point.coefficient * (sigma - self.eps) * place.projected_grad[point.direction].double()
                changes.setdefault(point.direction, []).append(change)
        value = float(torch.stack([torch.stack(both).mean().abs() for both in changes.values()]).mean())
        return value if math.isfinite(value) else math.inf

    @property
    def loss(self) -> float:
        return statistics.fmean(float(place.losses.double().mean()) for place in self.places)


def survey(zm: ZOModel, batches: Iterable[Any], most: int, watch: Callable[[int, int], None] | None = None) -> Survey:
    """Find σ* with at most ``most`` evaluations of a step's points.

    Half decades of σ on the first batch until the change is passed, then further directions and batches at the best
    estimate so far: F grows as σ² close to θ and about so at σ*, where the estimate moves less and less.
    """
    at = _Surveyor(zm, batches, most, watch)
    blocks = len(zm.options()["blocks"])  # a joint wandering costs what the blocks' cost together
    first, sigma = at.next_place(), at.eps
    samples: list[tuple[float, float]] = []
    for _ in range(LEVELS):
        sigma *= GROWTH
        samples.append((sigma, blocks * at.change(first, sigma)))
        if samples[-1][1] > SHARE * abs(at.loss):
            break
    else:
        raise ZOError(
            f"lr='auto' found nothing to go by: a perturbation of {sigma:.1g} leaves the loss at {at.loss:.4g}; "
            "what moves does not change it, or give lr a number"
        )
    while at.made + 2 <= most:
        place = at.next_place()
        sigma = _crossing(samples, SHARE * abs(at.loss))
        samples.append((sigma, blocks * at.change(place, sigma)))
    target = SHARE * abs(at.loss)
    rows = first.projected_grad.numel() if first.losses.ndim == 2 else 1
    squares = [float(g.double().square().mean()) for g in at.gradients]
    return Survey(at.loss, math.sqrt(_upper(squares)), _crossing(samples, target), target, at.forwards, rows)


def _crossing(samples: list[tuple[float, float]], target: float) -> float:
    """σ at which the mean change, and its standard error on top, is ``target``.

    Samples up to a little above σ are carried there along F ∝ σ² and averaged. A rate that is too high does more harm
    than one that is too low.
    """
    sigma, change = samples[-1] if len(samples) == 1 else max(samples, key=lambda each: each[1])
    sigma *= min(1.0, math.sqrt(target / max(change, target)))
    for _ in range(20):
        near = [each for each in samples if each[0] < NEAR * sigma] or samples[:1]
        changes = [min(change * (sigma / at) ** 2, OUTLIER * target) for at, change in near]
        factor = math.sqrt(target / max(_upper(changes), target / OUTLIER))
        sigma *= factor
        if abs(factor - 1) < 0.005:
            break
    return sigma


def _upper(values: list[float]) -> float:
    """The mean, and its standard error on top: what is measured with few samples counts for more."""
    return statistics.fmean(values) + (statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0)
