"""A run as the engines see it (:class:`Job`), and the interface of an engine: evaluate the loss, write an update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zowrap.errors import ZOError
from zowrap.loss.module import Batch, LossModule
from zowrap.numerics.dtypes import is_16_bit
from zowrap.rules.base import MASTER, Rule, Scalars
from zowrap.rules.estimators import Estimator, Point
from zowrap.step import selections
from zowrap.step.arithmetic import Conclusion
from zowrap.step.blocks import Block
from zowrap.step.credit import Credit, Piece
from zowrap.step.directions import Direction
from zowrap.step.lowrank import Layout, matrix_shape
from zowrap.step.method import Method
from zowrap.step.options import StepOptions, hyper_of
from zowrap.step.parameters import Parameter

Signs = Callable[[int], Tensor]
Project = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class QuantMode:
    """The mode in which the quantised weights of a model move.

    Attributes:
        name: one of :data:`zowrap.names.QUANT_MODES`.
        why: the reason, in words, where it was not asked for.
        rounds: whether some layers round their inputs to 8 bit, which puts a floor under ε.
        largest_slope: projected gradients are cut to ± this; None leaves them as they are.
    """

    name: str
    why: str
    rounds: bool
    largest_slope: float | None = None


@dataclass
class Job:
    """Everything an engine needs to know about the run: the model's loss, what moves, and how.

    Attributes:
        estimator: whose points a step evaluates, where the rule has none of its own.
        project: losses ``[points]`` and ε → projected gradients.
        slots: ``slots[name][i]`` is the float32 state of ``parameters[i]``; the master of one that has none is empty.
        blocks: which parameters are perturbed and updated together; one block of all of them by default.
        states: scalar state of the rule, 0-d float32 tensors by name, for each block.
        hyper: 0-d float32 tensors ``lr``, ``eps``, ``weight_decay``; their values change, the tensors stay.
        decays: whether a weight decay was asked for at all.
        quant_mode: how quantised weights move; None where the model has none.
        second_point: what 16-bit weights' updates go along, see :func:`zowrap.step.arithmetic.evaluated_direction`.
        selected: descriptions of the named selections that chose what moves.
    """

    loss: LossModule
    parameters: list[Parameter]
    rule: Rule
    estimator: Estimator
    project: Project
    direction: Direction
    queries: int
    blocks: list[Block]
    states: list[Scalars]
    slots: dict[str, list[Tensor]]
    hyper: Scalars
    decays: bool
    device: torch.device
    quant_mode: QuantMode | None = None
    second_point: float | None = None
    selected: Sequence[str] = ()

    @staticmethod
    def of(
        loss: LossModule,
        method: Method,
        options: StepOptions,
        parameters: list[Parameter],
        blocks: list[Block],
        quant_mode: QuantMode | None,
    ) -> Job:
        """Put a run together, with its rule's state at the beginning.

        Args:
            options: with every default filled in.
        """
        rule, device = method.rule, parameters[0].tensor.device
        return Job(
            loss=loss,
            parameters=parameters,
            rule=rule,
            estimator=method.estimator,
            project=_clip(method.project, None if quant_mode is None else quant_mode.largest_slope),
            direction=method.direction,
            queries=method.queries,
            blocks=blocks,
            states=[{name: torch.tensor(v, device=device) for name, v in rule.state.items()} for _ in blocks],
            slots={name: [_new_slot(method, name, p) for p in parameters] for name in rule.slots},
            hyper={name: torch.tensor(value, device=device) for name, value in hyper_of(options).items()},
            decays=options.weight_decay > 0,
            device=device,
            quant_mode=quant_mode,
            second_point=method.second_point,
            selected=selections.describe(options.trainable),
        )

    def slots_of(self, index: int) -> Scalars:
        """The state of a parameter that has its shape."""
        return {name: self.slots[name][index] for name in self.rule.element_slots(self.parameters[index].tensor.dtype)}

    def kept(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """Every tensor of the rule's state: slot, whose it is, tensor. Only 16-bit weights have masters."""
        for name, tensors in self.slots.items():
            for parameter, tensor in zip(self.parameters, tensors, strict=True):
                if name != MASTER or is_16_bit(parameter.tensor):
                    yield name, parameter, tensor

    def direction_slots_of(self, index: int) -> Scalars:
        return {name: self.slots[name][index] for name in self.rule.direction_slots}

    @functools.cached_property
    def points(self) -> list[Point]:
        """The points at which a step evaluates the loss, in order."""
        return (self.rule.points or self.estimator.points)(self.queries)

    @functools.cached_property
    def candidates(self) -> int:
        """The number of losses that the rule asks for once the projected gradient is known."""
        candidates = self.rule.candidates
        one = torch.zeros(1, device=self.device)
        return 0 if candidates is None else candidates(one, self.hyper).numel()

    @functools.cached_property
    def ids(self) -> Tensor:
        """int64 ``[parameters]``: what each parameter's noise is derived from."""
        return torch.tensor([p.id for p in self.parameters], dtype=torch.int64, device=self.device)

    @property
    def masters(self) -> bool:
        """Whether 16-bit weights are rounded copies of float32 ones."""
        return MASTER in self.rule.slots

    def count(self, block: int) -> int:
        """Number of elements d of a block."""
        return sum(self.parameters[i].tensor.numel() for i in self.blocks[block].indices)

    @property
    def state_bytes(self) -> int:
        """Memory of the rule's state."""
        tensors = [*(t for each in self.slots.values() for t in each), *(t for s in self.states for t in s.values())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def reads(self) -> list[str]:
        """The slots that the rule's direction reads, those of a parameter's shape first."""
        return sorted(self.rule.direction_slots, key=lambda name: self.rule.slots[name].kind != "element")

    def left_of(self, index: int) -> Tensor | None:
        """The rule's state in the shape of the parameter's left factor, where it keeps one."""
        return next((self.slots[name][index] for name in self.rule.slot_names("left")), None)

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """The layout of the factors of low-rank directions for each block; empty for full-rank ones."""
        law = self.direction.lowrank
        return [] if law is None else [Layout(self.parameters, block.indices, law) for block in self.blocks]


def _clip(project: Project, largest: float | None) -> Project:
    """One wild difference of losses must not move every scale of a quantised model by a factor."""
    if largest is None:
        return project
    return lambda losses, eps: project(losses, eps).clamp(-largest, largest)


def _new_slot(method: Method, name: str, parameter: Parameter) -> Tensor:
    """The state that a rule keeps for a parameter under one name, before the first step: float32."""
    rule, slot, w = method.rule, method.rule.slots[name], parameter.tensor
    if name == MASTER:
        return w.detach().to(torch.float32, copy=True) if is_16_bit(w) else torch.empty(0, device=w.device)
    if slot.kind == "parameter":
        first = rule.refresh(w.detach(), 0) if rule.refresh is not None else None
        value = slot.initial if first is None else first[name]
        return torch.as_tensor(value, dtype=torch.float32, device=w.device).clone()
    if slot.kind == "left":
        lowrank = method.direction.lowrank
        if lowrank is None or lowrank.nu is None:
            raise ZOError(
                f"{rule.name} keeps state in the shape of a low-rank direction's factor: "
                f"{method.direction.name} has none"
            )
        rows, _, rank = matrix_shape(w, lowrank.rank)
        return torch.full((rows, rank), slot.initial, dtype=torch.float32, device=w.device)
    return torch.full(w.shape, slot.initial, dtype=torch.float32, device=w.device)


@dataclass
class DirectionNoise:
    """One direction of one step: where its noise comes from, and the numbers that shape it.

    With ``per_example`` it is one direction for each of a batch's examples.

    Attributes:
        block: the active block.
        keys: int32 ``[P, 2]``, one key per parameter; unused where ``factors`` is given.
        scale: 0-d float32, the direction's normalisation (1 unless the law needs one).
        scalars: numbers that the rule's ``direction`` reads.
        factors: float32 ``[directions, size]``: the factors of low-rank directions, see :mod:`zowrap.step.lowrank`.
        old_factors: the same under the right keys that the rule's ``"left"`` state is expressed in.
        moved: 0-d bool: whether those are other keys than this step's.
    """

    block: int
    keys: Tensor
    scale: Tensor
    scalars: Scalars
    factors: Tensor | None = None
    per_example: bool = False
    old_factors: Tensor | None = None
    moved: Tensor | None = None


class Engine(Protocol):
    """The two engines."""

    name: str

    def one_batch(self) -> AbstractContextManager[None]:
        """Inside, every call of :meth:`losses` has the same batch and the same weights, and may share work."""
        ...

    def losses(self, batch: Batch, query: DirectionNoise | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Loss sums float32 ``[points, rows]`` at θ + coefficients[p]·z, and weights float32 ``[rows]``.

        Only the query's block is perturbed. ``query`` None evaluates θ itself, as one point.
        """
        ...

    def factors(self, block: int, keys: Tensor, right_keys: Tensor) -> Tensor:
        """float32 ``[directions, size]``: the factors of low-rank directions under keys ``[directions, P, 2]``."""
        ...

    def squared_norm(self, block: int, keys: Tensor) -> Tensor:
        """0-d float64: ‖u‖² of the raw noise under ``keys`` over the block's elements."""
        ...

    def update(self, queries: Sequence[DirectionNoise], rounding_keys: Tensor, conclusion: Conclusion) -> None:
        """Write the weights, the slots and the scalar state: the only place that does."""
        ...

    def credit(self, batch: Batch, signs: Signs, keep_inputs: bool) -> tuple[Tensor, Tensor, list[Piece]]:
        """Loss sums float32 ``[1, rows]`` at θ, weights ``[rows]``, and what each parameter that gets credit got.

        Args:
            signs: ``signs(inputs)`` draws the sketch, see :func:`zowrap.step.credit.draw_sketch`.
            keep_inputs: the inputs of the products are part of it; otherwise a second forward makes them, where the
                engine can use them one after another.
        """
        ...

    def visit_credit(self, credit: Credit, visit: Callable[[int, list[Piece]], None]) -> None:
        """Call ``visit(parameter, pieces)`` for every parameter that got credit, its pieces with their inputs.

        Inputs that the pieces lack come from a second forward, and the pieces may lack them again afterwards. A
        parameter may be written while it is visited: what the others are visited with does not change.
        """
        ...

    def update_with(self, credit: Credit, rounding_keys: Tensor, factor: Tensor, conclusion: Conclusion) -> None:
        """Write the weights that got credit, the slots and the scalar state.

        Args:
            factor: 0-d float32: ĝ is ``factor`` times the G of the credit.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for ``inspect``."""
        ...
