"""``ZOModel``: a model and the zeroth-order step around it.

    step(batch) ── accumulate ── evaluate the points of the step's directions ── Accumulator
                └─ update ────── conclude (rule) ── engine.update (writes) ────── StepResult

The files that these call are small: :mod:`zowrap.step.step_directions`, :mod:`zowrap.model.accumulator`,
:mod:`zowrap.step.arithmetic`, :mod:`zowrap.rules`, and the engines.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from zowrap.checks import check_positive
from zowrap.engines.eager import EagerEngine
from zowrap.errors import Option, ZOError
from zowrap.loss.module import LossModule, count_rows, per_example_names
from zowrap.model.accumulator import Accumulator, Measurement
from zowrap.model.along import losses_along
from zowrap.model.cuda_graphs import build_graph_cache
from zowrap.model.descent import Descent
from zowrap.model.inputs import check_losses, check_weights, move_batch, name_batch
from zowrap.model.result import StepResult
from zowrap.model.schedule import Schedule
from zowrap.model.state import apply_state, check_state, collect_state
from zowrap.numerics import noise
from zowrap.rules.base import Rule
from zowrap.rules.estimators import Point
from zowrap.step import blocks as block_lib
from zowrap.step.arithmetic import Conclusion, conclude
from zowrap.step.credit import NO_REPLAY, draw_sketch
from zowrap.step.job import Engine, Job
from zowrap.step.options import StepOptions, hyper_of
from zowrap.step.parameters import Parameter, hash_shapes
from zowrap.step.step_directions import StepDirections, groups

if TYPE_CHECKING:
    from zowrap.model.choice import Planned

__all__ = ["StepResult", "ZOModel"]


class ZOModel:
    """A model and the zeroth-order step around it; made by :func:`zowrap.zo_wrap`.

    Attributes:
        model: the model as given; its tensors move.
        step_count: steps done, skipped ones included.
        options: the options of the run, every default filled in.
        planned: the steps to come, where they are known: they decide at the first batch whether compiling pays, unless
            an engine was asked for (:mod:`zowrap.model.choice`).
        job, engine, schedule, accumulator, descent, graphs: the parts of a step; internal, and only to be read.
    """

    def __init__(self, job: Job, engine: Engine, options: StepOptions, schedule: Schedule) -> None:
        self.model: nn.Module = job.loss.model
        self.job = job
        self.engine = engine
        self.options = options
        self.schedule = schedule
        self.seed = options.seed
        self.step_count = 0
        self.planned: Planned | None = None
        self.accumulator = Accumulator()
        self.descent = Descent(options.check_every if job.estimator.credit and job.rule.follows_estimate else 0)
        self.device_step: Tensor | None = None  # the step's number, 0-d int64, while a CUDA graph captures the step
        self.update_interrupted = False  # an update was broken off, or is under way
        self._hyper = hyper_of(options)  # what job.hyper holds, without reading it from the device
        self._groups = {alone: groups(job.points, job.device, alone) for alone in (False, True)}
        self._directions: StepDirections | None = None  # the current step's, once they are asked for
        self._shapes: dict[str, Any] | None = None  # the last batch, on the meta device
        self.graphs = build_graph_cache(self)

    # --- one step ---------------------------------------------------------------------------------------------

    def step(self, *batches: Any, **batch: Any) -> StepResult:
        """One training step on one batch: evaluate along the step's directions, then update.

        Args:
            batch: what the model's forward takes, ``labels`` included (tensors; other values are constants). It
                reaches ``loss_fn`` as a dictionary. One dictionary may be given instead: ``step(batch)``.
        """
        self.discard()
        if self.graphs is not None:
            result = self.graphs.step(name_batch(batches, batch))
            if result is not None:
                return result
        self.accumulate(*batches, **batch)
        return self.update()

    def accumulate(self, *batches: Any, **batch: Any) -> Tensor:
        """Evaluate one micro-batch at the points of the current step; nothing moves until :meth:`update`.

        Sums are kept weighted by label tokens (language models) or examples, so k micro-batches give the losses of
        their union.

        Returns:
            0-d float32: this micro-batch's loss, the mean over the evaluations.
        """
        inputs = self.prepare(name_batch(batches, batch))
        measured = self._evaluate(inputs)
        self.accumulator.credit.add(inputs, measured.pieces)
        evaluated_again = self.job.rule.candidates or self.descent.is_due(self.step_count)
        return self.accumulator.add(measured, inputs if evaluated_again else None)

    def update(
        self, losses: Tensor | None = None, projected_grad: Tensor | None = None, weights: Tensor | None = None
    ) -> StepResult:
        """Apply the rule once, to the accumulated micro-batches or to what is given, and go to the next step.

        Args:
            losses: float32 ``[points]`` instead of the accumulated ones, followed by those of the rule's candidates
                where it has them; ``[points, batch]`` for a population.
            projected_grad: float32 ``[queries]`` (or 0-d for one), ``[batch]`` for a population, instead of the
                estimate from the losses.
            weights: float32 ``[batch]``, each example's share of a population; by default all the same.

        Raises:
            ZOError: nothing was accumulated and nothing is given, or what is given has another shape.
        """
        job, per_example, points = self.job, self.job.estimator.per_example, len(self.job.points)
        if math.isnan(self.lr):
            raise ZOError(
                Option("lr", "auto"),
                " is not chosen yet: zowrap.tune_lr(zm, batches, steps=...) chooses it, before step 1",
            )
        credit = self.accumulator.credit
        if job.estimator.credit and (losses is not None or projected_grad is not None):
            raise ZOError(NO_REPLAY)
        if losses is None and self.accumulator.sums is not None:
            losses, weights = self.accumulator.losses(), self.accumulator.shares() if per_example else None
            if projected_grad is None:
                projected_grad = self._slopes()
            if job.rule.candidates is not None:
                losses = torch.cat((losses, self._candidate_losses(losses, projected_grad)))
        losses, projected_grad = check_losses(job, losses, projected_grad)
        weights = check_weights(job, losses, weights)
        if job.estimator.credit:
            queries = []
        else:
            queries = [self.directions.population(range(losses.shape[1]))] if per_example else self.directions.queries
        done = torch.full((), float(self.step_count), device=job.device)
        if self.device_step is not None:
            done = self.device_step.float()
        conclusion = conclude(
            job.rule,
            job.project,
            job.states[self.block],
            losses[:points],
            job.hyper,
            done,
            projected_grad,
            weights,
            losses[points:] if job.rule.candidates else None,
        )
        if credit.pieces and self.descent.is_due(self.step_count):
            evaluate = functools.partial(losses_along, self, self.accumulator.batches)
            length = self.lr * float(conclusion.coefficients["g"][0])
            self.descent.check(self.step_count, float(losses[0]), length, evaluate)
        rounding = noise.derive_keys(self.seed, self._step_number, 0, job.ids, noise.TAG_ROUNDING)
        facts = self.describe_step()
        with self._at_checked_rate(), self.writing():
            if job.estimator.credit:
                factor = self._credit_factor(conclusion)
                self.engine.update_with(credit, rounding, factor, conclusion)
            else:
                self.engine.update(queries, rounding, conclusion)
                self.directions.keep(conclusion.apply)
            self.step_count += 1
        g = conclusion.projected_grad
        single = job.queries == 1 and not per_example
        result = StepResult(conclusion.loss, g[0] if single else g, ~conclusion.apply, losses, weights, facts)
        self.discard()
        return result

    @contextmanager
    def _at_checked_rate(self) -> Iterator[None]:
        """Inside, the learning rate of the engines is the one that the checks have left of it."""
        if self.descent.factor == 1.0:
            yield
            return
        rate = self.job.hyper["lr"]
        rate.fill_(self.lr * self.descent.factor)
        try:
            yield
        finally:
            rate.fill_(self.lr)

    def _slopes(self) -> Tensor | None:
        """float32 ``[queries]``: projected gradients that do not come from losses, where the estimator has such."""
        credit = self.accumulator.credit
        if not self.job.estimator.credit:
            return self.accumulator.slopes()
        count = sum(self.job.parameters[i].tensor.numel() for i in credit.parameters)
        return (self.accumulator.size_of_credit() / count**0.5).reshape(1)

    def _credit_factor(self, conclusion: Conclusion) -> Tensor:
        """0-d float32: what the sums of credit are multiplied by in ĝ = Σ c_i z_i, with z = G / rms(G)."""
        weight = self.accumulator.weight
        assert weight is not None
        g, c = conclusion.projected_grad[0], conclusion.coefficients["g"][0]
        return torch.where(g > 0, c / (g * weight), 0.0).float()

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return the losses and projected gradients that :meth:`update` would use; nothing moves.

        Returns:
            float32 losses at :attr:`points` and projected gradients, shaped as in :class:`StepResult`, but
            ``[queries]`` for one query, too.

        Raises:
            ZOError: nothing was accumulated.
        """
        if self.accumulator.sums is None:
            raise ZOError("peek() has nothing to look at: call accumulate(**batch) first")
        losses, g = self.accumulator.losses(), self._slopes()
        return losses, self.job.project(losses, self.job.hyper["eps"]) if g is None else g

    def replay(self, record: dict[str, Any]) -> StepResult:
        """Apply the update of a journal record, without a forward pass: bitwise the original step.

        Raises:
            ZOError: the record belongs to another seed or step, or lacks a field.
        """
        if self.job.estimator.credit:
            raise ZOError(NO_REPLAY)
        try:
            step, seed, losses = record["step"], record["seed"], record["losses"]
            values = {name: float(record[name]) for name in self._hyper}
            g = torch.tensor(record["projected_grad"], dtype=torch.float32)
            losses = torch.tensor(losses, dtype=torch.float32)
            weights = record.get("weights")
            weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
            if weights is None and self.job.estimator.per_example:
                raise KeyError("weights")
            schedule = record.get("memory", "auto"), int(record.get("largest_batch", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise ZOError(f"this journal record cannot be replayed: {error!r} is missing or malformed") from None
        if seed != self.seed or step != self.step_count:
            raise ZOError(
                f"this journal record is step {step} of seed {seed}; the model stands at step {self.step_count} "
                f"of seed {self.seed}"
            )
        self.schedule.take(*schedule)
        self.discard()
        self.set_hyper(**values)
        return self.update(losses=losses, projected_grad=g, weights=weights)

    def discard(self) -> None:
        """Forget the micro-batches accumulated so far."""
        if self._directions is not None:
            self._directions.undo()
        self.accumulator, self._directions = Accumulator(), None

    @torch.no_grad()
    def loss(self, *batches: Any, **batch: Any) -> Tensor:
        """The loss at θ, 0-d float32. Nothing changes."""
        inputs = self.prepare(name_batch(batches, batch))
        sums, weights = self.engine.losses(inputs, None, torch.zeros(1, device=self.job.device))
        return (sums.double().sum() / weights.double().sum()).float()

    # --- the evaluations of a step ----------------------------------------------------------------------------

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the engine takes it; the loss learns from the first one which form it has.

        Raises:
            ZOError: the batch has no tensors or no rows, or an update was broken off.
        """
        self.require_intact()
        inputs = move_batch(batch, self.job.device)
        self.job.loss.settle(inputs)
        self._shapes = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
        return inputs

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any]) -> Measurement:
        """One micro-batch at the points of the step, grouped as the schedule has it."""
        per_example, exact = self.job.estimator.per_example, self.job.estimator.exact
        if per_example:
            per_example_names(batch)  # before anything is captured: raises where the batch does not fit
        self.schedule.settle(self.job, self.engine, batch, self._choose_engine)
        if self.job.estimator.credit:
            return self.assign_credit(batch)
        if per_example:
            first = self.accumulator.examples
            queries = [self.directions.population(range(first, first + count_rows(batch)))]
        else:
            queries = self.directions.queries
        sums: list[Tensor] = []
        slopes: list[Tensor] = []
        weights = torch.zeros(())
        if exact:
            for query in queries:
                value, slope, weights = cast("EagerEngine", self.engine).derivative(batch, query)
                sums.append(value.double().sum().reshape(1))
                slopes.append(slope.double().sum().reshape(1))
            return Measurement(torch.cat(sums), weights.double().sum(), torch.cat(slopes))
        with self.engine.one_batch():
            for direction, signs in self._groups[self.schedule.sequential]:
                along = None if direction is None else queries[direction]
                rows, weights = self.engine.losses(batch, along, signs * self.job.hyper["eps"])
                sums.append(rows.double() if per_example else rows.double().sum(-1))
        return Measurement(torch.cat(sums), weights.double() if per_example else weights.double().sum())

    def assign_credit(self, batch: dict[str, Any]) -> Measurement:
        """One prepared micro-batch at θ, with the residual credit that it gives; internal."""
        signs = functools.partial(draw_sketch, seed=self.seed, step=self._step_number, device=self.job.device)
        with self.engine.one_batch():
            rows, weights, pieces = self.engine.credit(batch, signs, not self.schedule.sequential)
        return Measurement(rows.double().sum(-1), weights.double().sum(), pieces=pieces)

    @torch.no_grad()
    def _candidate_losses(self, losses: Tensor, projected_grad: Tensor | None) -> Tensor:
        """float32 ``[candidates]``: the losses of the accumulated micro-batches at the rule's candidates."""
        job = self.job
        assert job.rule.candidates is not None
        g = job.project(losses, job.hyper["eps"]) if projected_grad is None else projected_grad
        coefficients = job.rule.candidates(g, job.hyper)
        total: Any = 0.0
        for batch in self.accumulator.batches:
            parts = coefficients.split(1) if self.schedule.sequential else [coefficients]
            sums = [self.engine.losses(batch, self.directions.queries[0], part)[0] for part in parts]
            total = total + torch.cat(sums).double().sum(-1)
        return (total / self.accumulator.weight).float()

    def _choose_engine(self, batch: dict[str, Any]) -> bool:
        """Choose the engine by the steps that are planned, once; returns whether it is another now."""
        if self.planned is None:
            return False
        from zowrap.model.choice import settle_engine

        planned, self.planned = self.planned, None
        return settle_engine(self, batch, planned)

    @property
    def directions(self) -> StepDirections:
        """The directions of the current step; internal."""
        if self._directions is None:
            job = self.job
            self._directions = StepDirections(job, self.engine, job.ids, self.seed, self._step_number, self.block)
        return self._directions

    @property
    def block(self) -> int:
        """Index of the block that the current step perturbs and updates."""
        return block_lib.active(self.step_count, len(self.job.blocks), self.options.block_order, self.seed)

    @property
    def _step_number(self) -> int | Tensor:
        """The current step as noise is derived from it."""
        return self.step_count if self.device_step is None else self.device_step

    # --- an update is whole or is never passed over -------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surrounds the writes of an update, the step's number among them: one that is broken off stays marked."""
        self.require_intact()
        self.update_interrupted = True
        yield
        self.update_interrupted = False

    def require_intact(self) -> None:
        """Raise :class:`ZOError` where an update was broken off (by Ctrl-C, say): only some weights have moved."""
        if self.update_interrupted:
            raise ZOError(
                f"the update of step {self.step_count} was broken off half-way: load the weights and the state of a "
                f"checkpoint, or load the model and wrap it again"
            )

    # --- facts, and values that may be set ----------------------------------------------------------------------

    def describe_step(self) -> dict[str, Any]:
        """The facts of the current step that its journal record holds beside the losses."""
        facts: dict[str, Any] = {"step": self.step_count, "seed": self.seed, **self._hyper}
        if self.descent.factor != 1.0:
            facts["lr"] *= self.descent.factor
        return facts if self.schedule.name == "auto" else {**facts, **self.schedule.record()}

    @property
    def rule(self) -> Rule:
        return self.job.rule

    @property
    def accumulated(self) -> bool:
        """Whether a micro-batch of the current step has been evaluated: :meth:`update` would apply it."""
        return self.accumulator.sums is not None

    @property
    def points(self) -> list[Point]:
        """The points at which a step evaluates the loss, in order."""
        return self.job.points

    @property
    def quantized(self) -> str | None:
        """The mode in which quantised weights move, see :mod:`zowrap.quant.modes`; None where there are none."""
        return None if self.job.quant_mode is None else self.job.quant_mode.name

    @property
    def masters(self) -> bool:
        """Whether 16-bit weights are rounded copies of float32 ones, which are part of the rule's state."""
        return self.job.masters

    @property
    def along(self) -> str:
        """The direction that updates of 16-bit weights go along: ``"drawn"`` or ``"evaluated"``."""
        return "drawn" if self.job.second_point is None else "evaluated"

    @property
    def loss_module(self) -> LossModule:
        """The model and its loss as they are evaluated: ``loss_module(batch) -> (sums, weights)``."""
        return self.job.loss

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters that move: canonical names and tensors."""
        return self.job.parameters

    @property
    def hyper(self) -> dict[str, float]:
        """The running ``lr``, ``eps`` and ``weight_decay``; a copy."""
        return dict(self._hyper)

    @property
    def lr(self) -> float:
        """Learning rate η. Setting it recompiles nothing. 0 is allowed: a schedule may end there."""
        return self._hyper["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ZOError(f"lr must be a finite number from 0, got {value!r}")
        self.set_hyper(lr=float(value))

    @property
    def eps(self) -> float:
        """Perturbation size ε. Setting it recompiles nothing."""
        return self._hyper["eps"]

    @eps.setter
    def eps(self, value: float) -> None:
        check_positive("", eps=value)
        self.set_hyper(eps=float(value))

    def set_hyper(self, **values: float) -> None:
        """Set ``lr``, ``eps`` or ``weight_decay``, unchecked; ``lr`` may be NaN, which leaves it open.

        Raises:
            ZOError: a weight decay where the step was built without one, or none where it was built with one.
        """
        if (values.get("weight_decay", 0.0) > 0) != self.job.decays and "weight_decay" in values:
            raise ZOError(
                f"this was recorded with weight_decay={values['weight_decay']:g}, the model is wrapped with "
                f"weight_decay={self._hyper['weight_decay']:g}: wrap it with the recorded one"
            )
        for name, value in values.items():
            if value != self._hyper[name]:
                self._hyper[name] = value
                self.job.hyper[name].fill_(value)

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rule state, step and seed: with the weights, enough to go on bitwise.

        Flat: tensors are the rule's (``slots/<slot>/<parameter>``, ``scalars/<block>/<name>``), the rest is ready for
        JSON.

        Raises:
            ZOError: an update was broken off, so that neither the state nor the weights are those of any step.
        """
        self.require_intact()
        return collect_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. The weights are the model's own business: load them too.

        Under ``memory="auto"`` steps go on under the state's schedule; one that was asked for stays.

        Raises:
            ZOError: the state is of another rule, model or set of options (the message names it); nothing changes.
        """
        check_state(state, collect_state(self))
        self.discard()
        apply_state(self, state)
        self.update_interrupted = False

    def save_pretrained(self, directory: str, metadata: dict[str, str] | None = None, **options: Any) -> None:
        """Write the model as safetensors in the Hugging Face layout; ``from_pretrained`` loads it."""
        from zowrap.storage.save import save_model

        self.require_intact()
        save_model(self.model, directory, metadata={**self.facts(), **(metadata or {})}, **options)

    def facts(self) -> dict[str, str]:
        """The facts about a run that the headers of its weight files hold.

        ``key`` is what all noise derives from: the seed, and which parameters it was drawn for.
        """
        key = f"seed {self.seed}, parameters {hash_shapes(self.job.parameters)}"
        return {"rule": self.rule.describe(), "steps": str(self.step_count), "seed": str(self.seed), "key": key}

    def inspect(self) -> Any:
        """Report the parameters that move, how they move and the costs: :class:`zowrap.model.inspect.Report`."""
        from zowrap.model.inspect import report

        return report(self.job, self.engine, self.schedule, self._hyper, self._shapes, check_every=self.descent.every)
