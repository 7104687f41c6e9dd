"""``ZOModel``: a model and the zeroth-order step around it.

One step is :meth:`ZOModel.accumulate` (evaluate the points of the step's directions), then :meth:`ZOModel.update`
(conclude, and let the engine write). What those call is one small file each: :mod:`zowrap.numerics.noise`,
:mod:`zowrap.rules.estimators`, :mod:`zowrap.step.arithmetic`, :mod:`zowrap.rules`, :mod:`zowrap.engines`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from zowrap.checks import check_positive
from zowrap.engines import build_engine
from zowrap.engines.eager import EagerEngine
from zowrap.errors import ZOError
from zowrap.loss.module import LossModule, count_rows, per_example_names
from zowrap.model.accumulator import Measured, Measurement
from zowrap.model.cuda_graphs import recorder_for
from zowrap.model.schedule import Schedule
from zowrap.model.state import LATER, check_state
from zowrap.numerics import noise
from zowrap.rules import estimators
from zowrap.rules.base import Rule
from zowrap.step import blocks as block_lib
from zowrap.step.arithmetic import conclude
from zowrap.step.job import Job
from zowrap.step.parameters import Parameter, parameters_hash
from zowrap.step.step_directions import Streams, groups

if TYPE_CHECKING:
    from zowrap.model.choice import Planned


@dataclass
class StepResult:
    """What a step returns. All tensors; reading one is what synchronises with the device.

    Attributes:
        loss: 0-d float32, the mean over the step's evaluations (not the loss at θ itself).
        projected_grad: float32, ``[]`` for one direction, ``[queries]`` for several, ``[batch]`` for a population.
        skipped: 0-d bool: a loss or projected gradient was not finite and nothing was changed.
        losses: float32, the evaluations in order: ``[points]``, and the rule's candidates where it asks for them;
            ``[points, batch]`` for a population.
        weights: float32 ``[batch]``, each example's share, for a population; else None.
    """

    loss: Tensor
    projected_grad: Tensor
    skipped: Tensor
    losses: Tensor
    weights: Tensor | None
    _facts: dict[str, Any] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """The step's line of the journal, ready for JSON: enough for :meth:`ZOModel.replay`."""
        return {
            **self._facts,
            **({} if self.weights is None else {"weights": self.weights.tolist()}),
            "loss": float(self.loss),
            "losses": self.losses.tolist(),
            "projected_grad": self.projected_grad.reshape(-1).tolist(),
            "skipped": bool(self.skipped),
        }


def _named(batches: tuple[Any, ...], batch: dict[str, Any]) -> dict[str, Any]:
    """``step(**batch)`` and ``step(batch)`` alike, the latter for any mapping."""
    if not batches:
        return batch
    if len(batches) > 1 or not isinstance(batches[0], Mapping):
        raise ZOError("a batch is given by name, step(input_ids=..., labels=...), or as one dictionary, step(batch)")
    return {**batches[0], **batch}


class ZOModel:
    """A model and the zeroth-order step around it; made by :func:`zo_wrap`.

    Attributes:
        model: the model as given; its tensors move.
        step_count: steps done, skipped ones included.
        planned: what is to come, where it is known: at the first batch the engine is chosen by it, unless one was
            asked for (:mod:`zowrap.model.choice`).
    """

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        values: dict[str, float],
        seed: int,
        estimator: estimators.Estimator,
        block_order: str,
        engine: str | None,
        schedule: Schedule,
    ) -> None:
        self.model = model
        self.seed = seed
        self.step_count = 0
        self.planned: Planned | None = None
        self.block_order = block_order
        self._job = job
        self._estimator = estimator
        self._values = values
        self._ids = torch.tensor([p.id for p in job.parameters], dtype=torch.int64, device=job.device)
        self._points = job.points
        self._schedule = schedule
        self._groups = {alone: groups(self._points, job.device, alone) for alone in (False, True)}
        self._engine = build_engine(engine, job, len(self._points))
        self._begun: Streams | None = None  # the current step's directions
        self._measured = Measured()
        self._shapes: dict[str, Any] | None = None  # the last batch, on the meta device
        self._device_step: Tensor | None = None  # the step's number, 0-d int64, while a step is recorded
        self._torn = False  # an update was broken off, or is under way
        self._recorder = recorder_for(self)

    # --- one step ---------------------------------------------------------------------------------------------

    def step(self, *batches: Any, **batch: Any) -> StepResult:
        """One training step on one batch: evaluate along the step's directions, then update.

        Args:
            batch: what the model's forward takes, ``labels`` included (tensors; other values are constants). It
                reaches ``loss_fn`` as a dictionary. One dictionary may be given instead: ``step(batch)``.
        """
        self.discard()
        if self._recorder is not None:
            result = self._recorder.step(_named(batches, batch))
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
        inputs = self._prepare(_named(batches, batch))
        return self._measured.add(self._evaluate(inputs), inputs if self._job.rule.candidates else None)

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
        job, per_example = self._job, self._estimator.per_example
        if math.isnan(self.lr):
            raise ZOError(
                "lr='auto' is not chosen yet: zowrap.tune_lr(zm, batches, steps=...) chooses it, before step 1"
            )
        if losses is None and self._measured.sums is not None:
            losses, weights = self._measured.losses(), self._measured.shares() if per_example else None
            if projected_grad is None:
                projected_grad = self._measured.slopes()
            if job.rule.candidates is not None:
                losses = torch.cat((losses, self._candidate_losses(losses, projected_grad)))
        losses, projected_grad = self._checked(losses, projected_grad)
        weights = self._checked_weights(losses, weights)
        streams = [self._streams.population(range(losses.shape[1]))] if per_example else self._streams.queries
        block, points = streams[0].block, len(self._points)
        done = torch.full((), float(self.step_count), device=job.device)
        if self._device_step is not None:
            done = self._device_step.float()
        conclusion = conclude(
            job.rule,
            job.project,
            job.states[block],
            losses[:points],
            job.hyper,
            done,
            projected_grad,
            weights,
            losses[points:] if job.rule.candidates else None,
        )
        rounding = noise.derive_keys(self.seed, self._now, 0, self._ids, noise.TAG_ROUNDING)
        facts = self._facts()
        with self._moving():
            self._engine.update(streams, rounding, conclusion)
            self._streams.keep(conclusion.apply)
            self.step_count += 1
        g = conclusion.projected_grad
        single = job.queries == 1 and not per_example
        result = StepResult(conclusion.loss, g[0] if single else g, ~conclusion.apply, losses, weights, facts)
        self.discard()
        return result

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Around the writes of an update, the step's number among them: what breaks them off is never passed over."""
        self._whole()
        self._torn = True
        yield
        self._torn = False

    def _whole(self) -> None:
        """Raise where an update was broken off (by Ctrl-C, say): some weights have moved, and others have not."""
        if self._torn:
            raise ZOError(
                f"the update of step {self.step_count} was broken off half-way: load the weights and the state of a "
                f"checkpoint, or load the model and wrap it again"
            )

    def _facts(self) -> dict[str, Any]:
        """What the journal says of the current step beside its losses."""
        facts: dict[str, Any] = {"step": self.step_count, "seed": self.seed, **self._values}
        return facts if self._schedule.name == "auto" else {**facts, **self._schedule.record()}

    def peek(self) -> tuple[Tensor, Tensor]:
        """What :meth:`update` would conclude from the accumulated micro-batches; nothing moves.

        Returns:
            float32 losses at :attr:`points` and projected gradients, shaped as in :class:`StepResult`, but
            ``[queries]`` for one query, too.

        Raises:
            ZOError: nothing was accumulated.
        """
        if self._measured.sums is None:
            raise ZOError("peek() has nothing to look at: call accumulate(**batch) first")
        losses, g = self._measured.losses(), self._measured.slopes()
        return losses, self._job.project(losses, self._job.hyper["eps"]) if g is None else g

    def _checked(self, losses: Tensor | None, projected_grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What :meth:`update` was given, as tensors of the shapes that this step has."""
        device, per_example = self._job.device, self._estimator.per_example
        if projected_grad is not None:
            projected_grad = torch.as_tensor(projected_grad, dtype=torch.float32, device=device).reshape(-1)
        points = len(self._points)
        if losses is None:
            if projected_grad is None:
                raise ZOError("update() has nothing to apply: call accumulate(**batch) first")
            if self._job.rule.candidates is not None:
                raise ZOError(f"{self._job.rule.name} compares losses: give update() the losses of its candidates too")
            losses = torch.zeros((points, projected_grad.numel()) if per_example else (points,), device=device)
        elif projected_grad is None and self._estimator.exact:
            raise ZOError(f"losses alone do not give {self._estimator.name!r} its slopes: give projected_grad too")
        losses = torch.as_tensor(losses, dtype=torch.float32, device=device)
        if per_example:
            if losses.ndim != 2 or losses.shape[0] != points or not losses.shape[1]:
                raise ZOError(f"a population's losses are [{points}, batch], got shape {tuple(losses.shape)}")
        elif losses.shape != (points + self._candidates,):
            count = points + self._candidates
            raise ZOError(f"this step has {count} evaluations, got losses of shape {tuple(losses.shape)}")
        directions = losses.shape[1] if per_example else self._job.queries
        if projected_grad is not None and projected_grad.shape != (directions,):
            what = "examples" if per_example else "queries"
            raise ZOError(f"this step has {directions} {what}, got {projected_grad.numel()} projected gradients")
        return losses, projected_grad

    def _checked_weights(self, losses: Tensor, weights: Tensor | None) -> Tensor | None:
        """The examples' shares of a population; None where the directions of a step all count the same."""
        if not self._estimator.per_example:
            if weights is not None:
                raise ZOError(f"weights are the examples' shares of a population, not of {self._estimator.name!r}")
            return None
        examples = losses.shape[1]
        if weights is None:
            return torch.full((examples,), 1 / examples, device=losses.device)
        weights = torch.as_tensor(weights, dtype=torch.float32, device=losses.device)
        if weights.shape != (examples,):
            raise ZOError(f"this population has {examples} examples, got weights of shape {tuple(weights.shape)}")
        return weights

    @property
    def _candidates(self) -> int:
        """How many losses the rule asks for once the projected gradient is known."""
        return self._job.candidates

    @torch.no_grad()
    def _candidate_losses(self, losses: Tensor, projected_grad: Tensor | None) -> Tensor:
        """float32 ``[candidates]``: the losses of the accumulated micro-batches at the rule's candidates."""
        job = self._job
        assert job.rule.candidates is not None
        g = job.project(losses, job.hyper["eps"]) if projected_grad is None else projected_grad
        coefficients = job.rule.candidates(g, job.hyper)
        total: Any = 0.0
        for batch in self._measured.batches:
            parts = coefficients.split(1) if self._schedule.sequential else [coefficients]
            sums = [self._engine.losses(batch, self._streams.queries[0], part)[0] for part in parts]
            total = total + torch.cat(sums).double().sum(-1)
        return (total / self._measured.weight).float()

    def replay(self, record: dict[str, Any]) -> StepResult:
        """Apply the update of a journal record, without a forward pass: bitwise the original step.

        Raises:
            ZOError: the record belongs to another seed or step, or lacks a field.
        """
        try:
            step, seed, losses = record["step"], record["seed"], record["losses"]
            values = {name: float(record[name]) for name in self._values}
            g = torch.tensor(record["projected_grad"], dtype=torch.float32)
            losses = torch.tensor(losses, dtype=torch.float32)
            weights = record.get("weights")
            weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
            if weights is None and self._estimator.per_example:
                raise KeyError("weights")
            schedule = record.get("memory", "auto"), int(record.get("largest_batch", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise ZOError(f"this journal record cannot be replayed: {error!r} is missing or malformed") from None
        if seed != self.seed or step != self.step_count:
            raise ZOError(
                f"this journal record is step {step} of seed {seed}; the model stands at step {self.step_count} "
                f"of seed {self.seed}"
            )
        self._schedule.take(*schedule)
        self.discard()
        self._set(**values)
        return self.update(losses=losses, projected_grad=g, weights=weights)

    def discard(self) -> None:
        """Forget the micro-batches accumulated so far."""
        if self._begun is not None:
            self._begun.undo()
        self._measured, self._begun = Measured(), None

    @torch.no_grad()
    def loss(self, *batches: Any, **batch: Any) -> Tensor:
        """The loss at θ, 0-d float32. Nothing changes."""
        sums, weights = self._engine.losses(
            self._prepare(_named(batches, batch)), None, torch.zeros(1, device=self._job.device)
        )
        return (sums.double().sum() / weights.double().sum()).float()

    # --- the points of a step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any]) -> Measurement:
        """One micro-batch at the points of the step, grouped as the schedule has it."""
        if self._estimator.per_example:
            per_example_names(batch)  # before anything is captured: raises where the batch does not fit
        self._schedule.settle(self._job, self._engine, batch, self._choose_engine)
        if self._estimator.per_example:
            first = self._measured.examples
            streams = [self._streams.population(range(first, first + count_rows(batch)))]
        else:
            streams = self._streams.queries
        sums: list[Tensor] = []
        slopes: list[Tensor] = []
        weights = torch.zeros(())
        if self._estimator.exact:
            for stream in streams:
                value, slope, weights = cast("EagerEngine", self._engine).derivative(batch, stream)
                sums.append(value.double().sum().reshape(1))
                slopes.append(slope.double().sum().reshape(1))
            return Measurement(torch.cat(sums), weights.double().sum(), torch.cat(slopes))
        with self._engine.one_batch():
            for direction, signs in self._groups[self._schedule.sequential]:
                along = None if direction is None else streams[direction]
                rows, weights = self._engine.losses(batch, along, signs * self._job.hyper["eps"])
                sums.append(rows.double() if self._estimator.per_example else rows.double().sum(-1))
        return Measurement(torch.cat(sums), weights.double() if self._estimator.per_example else weights.double().sum())

    def _choose_engine(self, batch: dict[str, Any]) -> bool:
        """Let what is planned choose the engine, once: whether it is another now."""
        if self.planned is None:
            return False
        from zowrap.model.choice import settle_engine

        planned, self.planned = self.planned, None
        return settle_engine(self, batch, planned)

    @property
    def _streams(self) -> Streams:
        """The directions of the current step."""
        if self._begun is None:
            self._begun = Streams(self._job, self._engine, self._ids, self.seed, self._now, self._block)
        return self._begun

    @property
    def _block(self) -> int:
        """The block that the current step moves."""
        return block_lib.active(self.step_count, len(self._job.blocks), self.block_order, self.seed)

    @property
    def _now(self) -> int | Tensor:
        """The current step as what noise is derived from."""
        return self.step_count if self._device_step is None else self._device_step

    def _prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._whole()
        inputs = {}
        for name, value in batch.items():
            if isinstance(value, Tensor):
                # Compiled code relies on the strides.
                inputs[name] = value.to(self._job.device, non_blocking=True).contiguous()
            elif value is not None:
                inputs[name] = value
        tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
        if not tensors:
            raise ZOError("a step needs a batch of tensors, for example step(input_ids=..., labels=...)")
        if any(t.ndim and t.shape[0] == 0 for t in tensors):
            raise ZOError("this batch has no rows")
        self._job.loss.settle(inputs)
        self._shapes = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}
        return inputs

    # --- what can be read and set -----------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        return self._job.rule

    @property
    def accumulated(self) -> bool:
        """Whether a micro-batch of the current step has been evaluated: :meth:`update` would apply it."""
        return self._measured.sums is not None

    @property
    def points(self) -> list[estimators.Point]:
        """Where a step evaluates the loss, in order."""
        return self._points

    def options(self) -> dict[str, Any]:
        """The options of ``zo_wrap`` under which a step probes; ``blocks`` by the names they have here."""
        job = self._job
        return {
            "rule": job.rule,
            "eps": self.eps,
            "seed": self.seed,
            "direction": replace(job.direction, shape=None),  # the rule has its shape already
            "queries": job.queries,
            "estimator": self._estimator.name,
            "blocks": [block.name for block in job.blocks],
            "block_order": self.block_order,
            "memory": self._schedule.name,
        }

    @property
    def quantized(self) -> str | None:
        """How the model's quantised weights move, see :mod:`zowrap.quant.modes`; None where it has none."""
        return None if self._job.quant_mode is None else self._job.quant_mode.name

    @property
    def masters(self) -> bool:
        """Whether 16-bit weights are rounded copies of float32 ones, which are part of the rule's state."""
        return self._job.masters

    @property
    def along(self) -> str:
        """What 16-bit weights' updates go along: the direction ``"drawn"`` or the one ``"evaluated"``."""
        return "drawn" if self._job.other is None else "evaluated"

    @property
    def loss_module(self) -> LossModule:
        """The model and its loss as they are evaluated: ``loss_module(batch) -> (sums, weights)``."""
        return self._job.loss

    @property
    def parameters(self) -> list[Parameter]:
        """What moves: canonical names and tensors."""
        return self._job.parameters

    @property
    def lr(self) -> float:
        """Learning rate η. Setting it recompiles nothing. 0 is allowed: a schedule may end there."""
        return self._values["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ZOError(f"lr must be a finite number from 0, got {value!r}")
        self._set(lr=float(value))

    @property
    def eps(self) -> float:
        """Perturbation size ε. Setting it recompiles nothing."""
        return self._values["eps"]

    @eps.setter
    def eps(self, value: float) -> None:
        check_positive("zo_wrap", eps=value)
        self._set(eps=float(value))

    def _set(self, **values: float) -> None:
        if (values.get("weight_decay", 0.0) > 0) != self._job.decays and "weight_decay" in values:
            raise ZOError(
                f"this was recorded with weight_decay={values['weight_decay']:g}, the model is wrapped with "
                f"weight_decay={self._values['weight_decay']:g}: wrap it with the recorded one"
            )
        for name, value in values.items():
            if value != self._values[name]:
                self._values[name] = value
                self._job.hyper[name].fill_(value)

    # --- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rule state, step and seed: with the weights, enough to go on bitwise.

        Flat: tensors are the rule's (``slots/<slot>/<parameter>``, ``scalars/<block>/<name>``), the rest is ready for
        JSON.

        Raises:
            ZOError: an update was broken off, so that neither the state nor the weights are those of any step.
        """
        self._whole()
        return self._state()

    def _state(self) -> dict[str, Any]:
        job = self._job
        state: dict[str, Any] = {
            "rule": job.rule.describe(),
            "step": self.step_count,
            "seed": self.seed,
            "direction": job.direction.name,
            "estimator": self._estimator.name,
            "queries": job.queries,
            "blocks": [block.name for block in job.blocks],
            "block_order": self.block_order,
            "along": self.along,
            "parameters": parameters_hash(job.parameters),
            "loss": job.loss.form,
            **self._schedule.record(),
            **self._values,
        }
        for block, scalars in zip(job.blocks, job.states, strict=True):
            state.update({f"scalars/{block.name}/{name}": value.clone() for name, value in scalars.items()})
        for slot, parameter, tensor in job.kept():
            state[f"slots/{slot}/{parameter.name}"] = tensor.clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`. The weights are the model's own business: load them too.

        Under ``memory="auto"`` steps go on under the state's schedule; one that was asked for stays.

        Raises:
            ZOError: the state is of another rule, model or set of options (the message names it); nothing changes.
        """
        check_state(state, self._state())
        state = {**LATER, **state}
        self._schedule.take(state["memory"], state["largest_batch"])
        self.discard()
        self._set(**{name: float(state[name]) for name in self._values})
        job = self._job
        job.loss.settle_as(state["loss"])
        for block, scalars in zip(job.blocks, job.states, strict=True):
            for name, value in scalars.items():
                value.copy_(state[f"scalars/{block.name}/{name}"])
        for slot, parameter, tensor in job.kept():
            tensor.copy_(state[f"slots/{slot}/{parameter.name}"])
        self.step_count, self.seed = state["step"], state["seed"]
        self._torn = False

    def save_pretrained(self, directory: str, metadata: dict[str, str] | None = None, **options: Any) -> None:
        """Write the model as safetensors in the Hugging Face layout; ``from_pretrained`` loads it."""
        from zowrap.storage.save import save_model

        self._whole()
        save_model(self.model, directory, metadata={**self.facts(), **(metadata or {})}, **options)

    def facts(self) -> dict[str, str]:
        """What the header of a weight file says about how the weights came about.

        ``key`` is what all noise derives from: the seed, and which parameters it was drawn for.
        """
        key = f"seed {self.seed}, parameters {parameters_hash(self._job.parameters)}"
        return {"rule": self.rule.describe(), "steps": str(self.step_count), "seed": str(self.seed), "key": key}

    def inspect(self) -> Any:
        """What moves, how, and at what cost: see :class:`zowrap.model.inspect.Report`."""
        from zowrap.model.inspect import report

        return report(self._job, self._engine, self._schedule, self._values, self._shapes)
