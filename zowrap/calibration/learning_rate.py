"""Choose the learning rate for ``lr="auto"``, for any rule, with a few forwards before the first step.

A step of size η moves a little along the gradient and mostly at random, because one direction says so little about the
gradient. After T steps this random drift has reached a distance σ_T, measured in units of the perturbation. A run may
drift as long as the loss there is still much the same. Apart from the slope, a perturbation of size σ changes the loss
by

    F(σ) = E_z | ½ f(θ + σz) + ½ f(θ − σz) − f(θ) |

which forwards measure without a step. η is chosen so that the drift of the whole run would change the loss of a batch
by a fixed share, F(σ_T) = SHARE · f(θ). This takes two measurements, neither of which writes a weight:

1. Find σ* with F(σ*) = SHARE · f(θ), by forwards at growing ε along directions of the run, on batches of the training
   data (:func:`survey`). The same forwards give the size of the projected gradients.
2. Find η with σ_T(η) = σ*, by simulating the rule with projected gradients of that size
   (:mod:`zowrap.calibration.simulation`).

F is measured at the distance that the run will reach, not extrapolated from the curvature at θ. Because the run's own
directions are evaluated, F accounts for what moves (all weights, adapters, one block per step), for the law of the
directions and for the weights' dtype; the simulation accounts for the rule. docs/learning-rate.md has the measurements.
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
from zowrap.calibration.credit_rate import CreditRate, choose_credit_rate
from zowrap.calibration.simulation import Simulation
from zowrap.errors import Option, ZOError, not_finite
from zowrap.model.zo_model import ZOModel

SHARE = 0.08
# The survey may evaluate a step's points this many times: a share of the planned steps, within two bounds. Four are
# needed to find the scale, and a dozen more because the change along one direction can be several times the mean if
# only few directions of the loss are steep.
EVALUATIONS, LEAST, MOST = 0.05, 16, 40
REACH = 4.0  # times ε: beyond it the loss is no longer linear, and projected gradients come out too small
GROWTH = math.sqrt(10.0)  # of ε, in the search for σ*
LEVELS = 12  # half decades to try: from ε = 1e-3 to weights of size 1000
OUTLIER = 10.0  # times the target: the largest change that a single direction contributes to the mean
NEAR = 3.5  # a sample is used for σ if its own σ is smaller, or larger by at most this factor, where F ∝ σ² holds
MAX_SIMULATIONS = 8  # two suffice if the distance is proportional to η


@dataclass(frozen=True)
class LearningRate:
    """A choice of η, and the measurements behind it.

    Attributes:
        lr: η.
        steps: the planned number of steps.
        loss: the mean loss at θ over the batches used.
        projected_grad: root mean square of the projected gradients, with one standard error added.
        sigma: σ*, the size of a perturbation that changes the loss by ``change``, apart from the slope.
        change: the allowed change of the loss.
        forwards: the number of forward passes made.
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
            f"{self.sigma:.2g} changes the loss of {self.loss:.3g} by {self.change:.2g}, and at this rate the random "
            f"drift of the run reaches that size at the end (|projected gradient| {self.projected_grad:.3g})"
        )

    def record(self) -> dict[str, Any]:
        """The choice as JSON types; ``LearningRate(**record)`` restores it."""
        return asdict(self)


def tune_lr(
    zm: ZOModel,
    batches: Iterable[Any],
    steps: int,
    *,
    schedule: Callable[[int], float] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> LearningRate | CreditRate:
    """Choose the learning rate of a run that is about to begin, and set ``zm.lr`` to it.

    With residual credit it is chosen in another way, see :mod:`zowrap.calibration.credit_rate`.

    Weights are only read; the rule's state, the step and ε do not change.

    Args:
        zm: the wrapped model, before its first step.
        batches: training batches as ``zm.step(**batch)`` takes them, or lists of the micro-batches of one step. At most
            20 are read; if there are fewer, they are used repeatedly.
        steps: the planned number of steps.
        schedule: ``schedule(t)``, step t's rate in units of η; constant by default.
        watch: called before each evaluation with the number of evaluations so far and their maximum.

    Returns:
        The choice; as a string, it is a sentence that explains it.

    Raises:
        ZOError: the model has already made a step, there is no batch, the loss is not finite, or nothing that moves
            changes it.
    """
    if zm.step_count:
        raise ZOError(
            Option("lr", "auto"), f" must be chosen before the first step, and this model has made {zm.step_count}"
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ZOError(f"steps must be a whole number from 1, got {steps!r}")
    if isinstance(batches, Mapping):
        raise ZOError("tune_lr needs several batches, each a dictionary: give a list of them, or a loader")
    if zm.job.estimator.credit:
        with preserve_state(zm):
            chosen = choose_credit_rate(zm, batches, steps, watch)
        zm.lr = chosen.lr
        return chosen
    if not any(point.coefficient for point in zm.points):
        raise ZOError(
            Option("lr", "auto"),
            " needs losses at perturbed weights, and this estimator evaluates none: give lr a number",
        )
    with preserve_state(zm):
        found = survey(zm, batches, max(LEAST, min(MOST, round(EVALUATIONS * steps))), watch)
    if not found.projected_grad or not found.change:
        raise ZOError(
            Option("lr", "auto"),
            f" found nothing to go by: the loss of {found.loss:.4g} is the same on both sides of every "
            "direction tried: use a larger eps, or give lr a number",
        )
    simulation = Simulation(zm, found.projected_grad, 2 * found.change / found.sigma**2, found.rows)
    lr = zm.rule.lr
    for _ in range(MAX_SIMULATIONS):  # the distance is proportional to η, or nearly so
        ratio = found.sigma / simulation.distance(lr, steps, schedule or (lambda t: 1.0))
        lr *= ratio
        if abs(math.log(ratio)) < 0.03:
            break
    zm.lr = lr = float(f"{lr:.3g}")
    return LearningRate(lr, steps, found.loss, found.projected_grad, found.sigma, found.change, found.forwards)


@contextmanager
def preserve_state(zm: ZOModel) -> Iterator[None]:
    """Restore the rule's state, step and ε and torch's generators on leaving."""
    state, device = zm.state_dict(), zm.job.device
    kept = machine.rng_states(device)
    try:
        yield
    finally:
        machine.restore_rng(device, kept)
        # The form of the loss and the schedule were found meanwhile, and stay.
        found = {"loss": zm.loss_module.form, **zm.schedule.record()}
        zm.load_state_dict({**state, **found, "lr": zm.rule.lr})
        zm.set_hyper(lr=state["lr"])  # which may not be chosen yet: no state to load


@dataclass
class Survey:
    """The measurements around θ; fields as in :class:`LearningRate`.

    Attributes:
        rows: the number of examples with their own direction: those of a batch in a population, else 1.
    """

    loss: float
    projected_grad: float
    sigma: float
    change: float
    forwards: int
    rows: int


@dataclass
class _ProbedBatch:
    """A training batch, with the losses and projected gradients of step ``step`` on it at the run's own ε."""

    step: int
    batches: list[Mapping[str, Any]]
    losses: Tensor
    projected_grad: Tensor


class _Surveyor:
    """Evaluates the points of steps without making the steps.

    Attributes:
        made, forwards: the number of evaluations of a step's points, and of forward passes, so far.
        probed: the batches used so far.
        gradients: projected gradients, float32, of every direction used so far.
    """

    def __init__(
        self, zm: ZOModel, batches: Iterable[Any], most: int, watch: Callable[[int, int], None] | None
    ) -> None:
        self.zm, self.most, self.watch = zm, most, watch
        self.eps = zm.eps
        self.made = self.forwards = 0
        self.probed: list[_ProbedBatch] = []
        self.gradients: list[Tensor] = []
        self._stream = iter(batches)
        self._seen: list[list[Mapping[str, Any]]] = []
        balance: dict[int, float] = {}
        for point in zm.points:
            balance[point.direction] = balance.get(point.direction, 0.0) + point.coefficient
        # Two-sided points cancel the slope, so each evaluation may use a new direction, which samples more projected
        # gradients. One-sided points need the slope along the same direction to subtract it.
        self._two_sided = not any(balance.values())

    def evaluate(self, step: int, batches: list[Mapping[str, Any]], eps: float) -> tuple[Tensor, Tensor]:
        """Evaluate the losses and projected gradients of a step at ``eps``."""
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

    def probe_next_batch(self) -> _ProbedBatch:
        """Evaluate the next batch at the run's own ε."""
        batch = next(self._stream, None)
        if batch is not None:
            self._seen.append([batch] if isinstance(batch, Mapping) else list(batch))
        if not self._seen:
            raise ZOError(Option("lr", "auto"), " needs at least one training batch")
        batches, step = self._seen[len(self.probed) % len(self._seen)], self.made
        losses, g = self.evaluate(step, batches, self.eps)
        if not bool(torch.isfinite(losses).all() & torch.isfinite(g).all()):
            raise not_finite(losses)
        self.probed.append(_ProbedBatch(step, batches, losses, g))
        return self.probed[-1]

    def change(self, probed: _ProbedBatch, sigma: float) -> float:
        """Measure F(σ) on a batch, as the mean over the step's directions; infinite if the loss is not finite."""
        step = self.made if self._two_sided else probed.step
        losses, _ = self.evaluate(step, probed.batches, sigma)
        changes: dict[int, list[Tensor]] = {}
        for i, point in enumerate(self.zm.points):
            if point.coefficient:
                change = (losses[i] - probed.losses[i]).double().mean()
                if not self._two_sided:
                    change -= point.coefficient * (sigma - self.eps) * probed.projected_grad[point.direction].double()
                changes.setdefault(point.direction, []).append(change)
        value = float(torch.stack([torch.stack(both).mean().abs() for both in changes.values()]).mean())
        return value if math.isfinite(value) else math.inf

    @property
    def loss(self) -> float:
        """The mean loss at the run's own ε over the batches used so far."""
        return statistics.fmean(float(probed.losses.double().mean()) for probed in self.probed)


def survey(zm: ZOModel, batches: Iterable[Any], most: int, watch: Callable[[int, int], None] | None = None) -> Survey:
    """Find σ* with at most ``most`` evaluations of a step's points.

    It first increases σ by half decades on the first batch until the change exceeds its target, then evaluates further
    directions and batches at the best estimate so far, which converges because F grows roughly as σ².
    """
    at = _Surveyor(zm, batches, most, watch)
    blocks = len(zm.job.blocks)  # a joint wandering costs what the blocks' cost together
    first, sigma = at.probe_next_batch(), at.eps
    samples: list[tuple[float, float]] = []
    for _ in range(LEVELS):
        sigma *= GROWTH
        samples.append((sigma, blocks * at.change(first, sigma)))
        if samples[-1][1] > SHARE * abs(at.loss):
            break
    else:
        raise ZOError(
            Option("lr", "auto"),
            f" found nothing to go by: a perturbation of {sigma:.1g} leaves the loss at {at.loss:.4g}: "
            "check that what moves changes the loss, or give lr a number",
        )
    while at.made + 2 <= most:
        probed = at.probe_next_batch()
        sigma = _find_crossing(samples, SHARE * abs(at.loss))
        samples.append((sigma, blocks * at.change(probed, sigma)))
    target = SHARE * abs(at.loss)
    rows = first.projected_grad.numel() if first.losses.ndim == 2 else 1
    squares = [float(g.double().square().mean()) for g in at.gradients]
    return Survey(
        at.loss, math.sqrt(_upper_estimate(squares)), _find_crossing(samples, target), target, at.forwards, rows
    )


def _find_crossing(samples: list[tuple[float, float]], target: float) -> float:
    """Find the σ at which the mean change plus one standard error equals ``target``.

    Samples up to a little above σ are scaled to it by F ∝ σ² and averaged. The standard error is added because a rate
    that is too high does more harm than one that is too low.
    """
    sigma, change = samples[-1] if len(samples) == 1 else max(samples, key=lambda each: each[1])
    sigma *= min(1.0, math.sqrt(target / max(change, target)))
    for _ in range(20):
        near = [each for each in samples if each[0] < NEAR * sigma] or samples[:1]
        changes = [min(change * (sigma / at) ** 2, OUTLIER * target) for at, change in near]
        factor = math.sqrt(target / max(_upper_estimate(changes), target / OUTLIER))
        sigma *= factor
        if abs(factor - 1) < 0.005:
            break
    return sigma


def _upper_estimate(values: list[float]) -> float:
    """The mean plus one standard error, so that few or scattered samples give a larger value."""
    return statistics.fmean(values) + (statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0)
