"""Define the protocol of an update rule: a handful of pure functions over tensors.

A rule never sees the model, the noise generator or the engine. It decides which points a step evaluates, how the
projected gradients become coefficients, and how one parameter is updated; the engines call those functions either
directly (eager) or after tracing them together with the noise into one fused kernel per parameter (compiled).

    points(queries)                     → the evaluations of a step             default: the estimator's
    refresh(w, step)                    → one number per parameter              default: none
    reduce(slots)                       → exact global sums over all parameters default: none
    direction(u, w, slots, scalars)     → z from raw noise u                    default: z = u
    scalars(state, probe, hyper)        → new scalar state, coefficients        once per step
    candidates(g, hyper)                → further points of the chosen line     default: none
    leaf(w, g, slots, c, hyper)         → new w, new slots                      once per element

where ``g`` is ĝ = Σ_i c["g"][i] · z_i, formed in registers from regenerated noise: no gradient buffer exists. A leaf
that needs more than ĝ (HiZOO: Σ_i c_i z_i²) takes the z_i themselves (``leaf_takes_directions``).
A rule sees only float32 tensors, whatever the dtype of the weights. Rounding, weight decay and the skipping of
non-finite steps happen outside it, in the same way for every rule.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, ParamSpec

import torch
from torch import Tensor

from zowrap.checks import check_count, check_flag, check_fraction, check_positive  # noqa: F401 (for rules of one's own)
from zowrap.errors import Option, ZOError
from zowrap.numerics.dtypes import SIXTEEN_BIT
from zowrap.rules.estimators import ESTIMATORS, Point

Scalars = dict[str, Tensor]
MASTER = "master"  # the slot that holds the float32 originals of 16-bit weights, see :func:`with_masters`


class Probe(NamedTuple):
    """The measurements of one step.

    Attributes:
        losses: float32 ``[points]``, the loss at each evaluation, in the order of the points.
        projected_grad: float32 ``[directions]``.
        step: 0-d float32, the number of steps done before this one.
        weights: float32 ``[directions]``, the weight of each direction in ĝ; they add up to 1. 1/q for q queries, the
            example's share of the label tokens for a population.
        candidates: float32 ``[candidates]``, the losses at the rule's ``candidates``; empty for most rules.
    """

    losses: Tensor
    projected_grad: Tensor
    step: Tensor
    weights: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class Slot:
    """One state tensor of a rule for each parameter, in float32.

    Attributes:
        kind: ``"element"`` (the parameter's shape), ``"parameter"`` (one number, which ``refresh`` sets and
            ``direction`` reads) or ``"left"`` (the shape of a low-rank direction's left factor: ``[rows, rank]`` for a
            matrix, ``[elements, 1]`` for a vector).
        initial: the value of every element before the first step.
    """

    kind: Literal["element", "parameter", "left"] = "element"
    initial: float = 0.0


class Choice(NamedTuple):
    """How a step probes the loss: the user's options, with the rule's defaults for those not given.

    Attributes:
        blocks: the number of blocks.
    """

    direction: str = "gaussian"
    estimator: str = "central"
    queries: int = 1
    blocks: int = 1

    @property
    def population(self) -> bool:
        """Whether every example has its own direction."""
        return ESTIMATORS[self.estimator].per_example


def _accept(choice: Choice) -> None:
    return None


def identity(u: Tensor, w: Tensor, slots: Scalars, scalars: Scalars) -> Tensor:
    """z = u: the direction of most rules."""
    return u


@dataclass(frozen=True)
class Rule:
    """An update rule. Build one with a constructor of :mod:`zowrap.rules`, not directly.

    Attributes:
        name: the rule's usual name in the literature.
        lr: default learning rate η; the current one arrives in ``hyper["lr"]``.
        hyper: every keyword argument of the constructor except ``lr``, for the journal and :meth:`describe`.
        scalars: ``scalars(state, probe, hyper) -> (state, coefficients)``; ``coefficients["g"]`` is ``[queries]``.
        leaf: ``leaf(w, g, slots, c, hyper) -> (w, slots)``.
        leaf_takes_directions: ``leaf`` gets the list of z_i in place of ``g``.
        state: initial scalar state, by name.
        slots: state per parameter, by name.
        defaults: direction, estimator and queries to use if the user names none.
        check: raises :class:`ZOError` for a choice of them that makes no sense for this rule.
        points: overrides the estimator's points (HiZOO also evaluates θ), with ``project`` to match.
        project: ``project(losses, eps) -> [queries]``.
        direction: ``direction(u, w, slots, scalars) -> z`` from the noise and the unperturbed weights; with
            ``direction_slots`` naming the slots it reads and ``direction_scalars(state, sums, hyper)`` the numbers.
        refresh: ``refresh(w, step) -> {slot: 0-d value}`` sets the ``"parameter"`` slots at the start of a step;
            ``None`` leaves them unchanged.
        left: ``left(slot, g_left, c) -> slot`` of the ``"left"`` slot, from Σ_i c["g"][i] · (left factor of z_i); the
            update then uses slot · (right factor)ᵀ in place of ĝ. Needs a direction whose right factor is shared
            and lazily resampled; ``state["epoch"]`` is the number of the sample that the slot is expressed in.
        candidates: ``candidates(g, hyper) -> coefficients``: further points θ + coefficient · z, evaluated once g is
            known (one direction only); their losses arrive in the probe.
        reduce: ``reduce(slots) -> {name: per-element summand}``, summed over every tunable element before the probes.
        origin: equal for two rules only if their functions compute the same. An object of the rule's own, which also a
            copy made by :func:`dataclasses.replace` gets anew, unless :func:`known` says more.
    """

    name: str
    lr: float
    hyper: Mapping[str, Any]
    scalars: Callable[[Scalars, Probe, Scalars], tuple[Scalars, Scalars]]
    leaf: Callable[[Tensor, Any, Scalars, Scalars, Scalars], tuple[Tensor, Scalars]]
    leaf_takes_directions: bool = False
    state: Mapping[str, float] = field(default_factory=dict)
    slots: Mapping[str, Slot] = field(default_factory=dict)
    defaults: Choice = field(default_factory=Choice)
    check: Callable[[Choice], None] = _accept
    points: Callable[[int], list[Point]] | None = None
    project: Callable[[Tensor, Tensor], Tensor] | None = None
    direction: Callable[[Tensor, Tensor, Scalars, Scalars], Tensor] = identity
    direction_slots: tuple[str, ...] = ()
    direction_scalars: Callable[[Scalars, Scalars, Scalars], Scalars] | None = None
    reduce: Callable[[Scalars], Scalars] | None = None
    refresh: Callable[[Tensor, int], Scalars | None] | None = None
    left: Callable[[Tensor, Tensor, Scalars], Tensor] | None = None
    candidates: Callable[[Tensor, Scalars], Tensor] | None = None
    origin: Hashable = field(default_factory=object, init=False, repr=False, compare=False)

    def slot_names(self, kind: str) -> list[str]:
        """The names of the slots of ``kind``, in order."""
        return [name for name, slot in self.slots.items() if slot.kind == kind]

    def element_slots(self, dtype: torch.dtype) -> list[str]:
        """The names of the ``"element"`` slots for weights of ``dtype``: only 16-bit weights have a master."""
        names = self.slot_names("element")
        return names if dtype in SIXTEEN_BIT else [name for name in names if name != MASTER]

    @property
    def shapes_directions(self) -> bool:
        """Whether the rule changes directions element by element, so that a low-rank direction would not stay one."""
        return self.direction is not identity or self.leaf_takes_directions

    @property
    def needs_directions(self) -> bool:
        """Whether the rule does more with directions than to follow ĝ, so that it cannot follow one from elsewhere."""
        own = (self.points, self.project, self.refresh, self.left, self.candidates, self.reduce)
        usual = self.defaults == Choice()
        return self.shapes_directions or not usual or any(each is not None for each in own)

    @property
    def follows_estimate(self) -> bool:
        """Whether a step is −η ĝ with the coefficients ``g``: its direction and length are known before it is made."""
        if set(self.slots) - {MASTER} or self.needs_directions:
            return False
        one, g = torch.ones(()), torch.tensor([1.0, -2.0])
        try:
            moved, _ = self.leaf(torch.zeros(2), g, {}, {"g": one.reshape(1)}, {"lr": one / 2, "eps": one})
        except KeyError:  # it needs numbers of its own
            return False
        return torch.equal(moved, -g / 2)

    def describe(self) -> str:
        """The rule as a constructor call: ``meazo(beta=0.99, zeta=1e-08)``."""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.hyper.items())})"


_P = ParamSpec("_P")


def known(constructor: Callable[_P, Rule]) -> Callable[_P, Rule]:
    """Name a constructor and its arguments as the origin of its rules: they share compiled kernels with their equals.

    For constructors of this package, whose functions depend on their arguments and on nothing else. η is left out: it
    reaches a rule's functions as a tensor. A rule made out of one of unknown origin is of unknown origin.
    """
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def build(*args: _P.args, **named: _P.kwargs) -> Rule:
        rule = constructor(*args, **named)
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "lr"}
        inner = [value.origin for value in values.values() if isinstance(value, Rule)]
        if all(isinstance(origin, str) for origin in inner):
            told = (f"{name}={v.origin if isinstance(v, Rule) else repr(v)}" for name, v in values.items())
            object.__setattr__(rule, "origin", f"{constructor.__name__}({', '.join(told)})")
        return rule

    return build


@known
def with_masters(rule: Rule) -> Rule:
    """Add a slot for float32 masters to ``rule``: 16-bit weights are then rounded copies of those.

    Raises:
        ZOError: the rule already has a slot called ``"master"``.
    """
    if MASTER in rule.slots:
        raise ZOError(
            f"{rule.name} has a slot called {MASTER!r}, which ",
            Option("masters", True),
            " needs: rename the rule's slot",
        )
    return replace(rule, slots={**rule.slots, MASTER: Slot()})


def mean_gradient(probe: Probe) -> Tensor:
    """The coefficients w_i g_i of the plain estimate ĝ = Σ w_i g_i z_i: float32 ``[directions]``."""
    return probe.projected_grad * probe.weights


def combine(coefficients: Tensor, tensors: Sequence[Tensor], total: Tensor | None = None) -> Tensor:
    """Compute Σ_i coefficients[i] · tensors[i], adding in this order, to ``total`` if it is given."""
    for i, tensor in enumerate(tensors):
        summand = coefficients[i] * tensor
        total = summand if total is None else total + summand
    assert total is not None
    return total


def received_share(beta: float, n: Tensor) -> Tensor:
    """1 − βⁿ, the total weight of the n values in a running average with memory β: Adam's bias correction.

    It uses expm1, because 1 − 0.999 in float32 has an error of 3e-5.
    """
    return -torch.expm1(n * (math.log(beta) if beta else -math.inf))
