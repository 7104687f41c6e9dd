"""The protocol of an update rule: a handful of pure functions over tensors.

A rule never sees the model, the noise generator or the engine. It says which points a step evaluates, how the
projected gradients become coefficients, and what happens to one parameter; the engines call those functions either
directly (eager) or after tracing them together with the noise into one fused kernel per parameter (compiled).

    points(queries)                     → the evaluations of a step             default: the estimator's
    reduce(slots)                       → exact global sums over all parameters default: none
    direction(u, slots, scalars)        → z from raw noise u                    default: z = u
    scalars(state, probe, hyper)        → new scalar state, coefficients        once per step
    leaf(w, g, slots, c, hyper)         → new w, new slots                      once per element

where ``g`` is ĝ = Σ_i c["g"][i] · z_i, formed in registers from regenerated noise: no gradient buffer exists. A leaf
that needs more than ĝ (HiZOO: Σ_i c_i z_i²) takes the z_i themselves (``leaf_takes_directions``).
All tensors a rule sees are float32 whatever the weights' dtype; rounding, weight decay and the skipping of
non-finite steps are done around it, the same for every rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zowrap.errors import ZOError
from zowrap.estimators import Point

Scalars = dict[str, Tensor]


class Probe(NamedTuple):
    """What one step measured.

    Attributes:
        losses: float32 ``[points]``, the loss at each evaluation, in the order of the points.
        projected_grad: float32 ``[queries]``.
        step: 0-d float32, the number of steps done before this one.
    """

    losses: Tensor
    projected_grad: Tensor
    step: Tensor


@dataclass(frozen=True)
class Slot:
    """State of a rule that is kept per parameter, in float32.

    Attributes:
        kind: ``"element"`` (the parameter's shape) or ``"columns"`` (``[columns, rank]`` for a matrix, the
            parameter's shape for a vector). The engines carry ``"element"`` alone; ``zo_wrap`` refuses the other.
        initial: the value it starts from.
        rank: for ``"columns"``.
    """

    kind: str = "element"
    initial: float = 0.0
    rank: int = 1


class Choice(NamedTuple):
    """How a step probes: names and number. The user's options, over what the rule states as its own default."""

    direction: str = "gaussian"
    estimator: str = "central"
    queries: int = 1


def _accept(choice: Choice) -> None:
    return None


def _identity(u: Tensor, slots: Scalars, scalars: Scalars) -> Tensor:
    return u


@dataclass(frozen=True)
class Rule:
    """An update rule. Build one with a constructor of :mod:`zowrap.rules`, not directly.

    Attributes:
        name: the field's name for it.
        lr: default learning rate η; the running one arrives in ``hyper["lr"]``.
        hyper: every keyword the constructor took, for records and for :meth:`describe`.
        scalars: ``scalars(state, probe, hyper) -> (state, coefficients)``; ``coefficients["g"]`` is ``[queries]``.
        leaf: ``leaf(w, g, slots, c, hyper) -> (w, slots)``.
        leaf_takes_directions: ``leaf`` gets the list of z_i in place of ``g``.
        state: initial scalar state, by name.
        slots: state per parameter, by name.
        defaults: direction, estimator and queries where the user names none.
        check: raises :class:`ZOError` for a choice of them that makes no sense for this rule.
        points: overrides the estimator's points (HiZOO also evaluates θ), with ``project`` to match.
        project: ``project(losses, eps) -> [queries]``.
        direction: ``direction(u, slots, scalars) -> z``; with ``direction_slots`` naming the slots it reads and
            ``direction_scalars(state, sums, hyper)`` the numbers it needs.
        reduce: ``reduce(slots) -> {name: per-element summand}``, summed over every tunable element before the probes.
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
    direction: Callable[[Tensor, Scalars, Scalars], Tensor] = _identity
    direction_slots: tuple[str, ...] = ()
    direction_scalars: Callable[[Scalars, Scalars, Scalars], Scalars] | None = None
    reduce: Callable[[Scalars], Scalars] | None = None

    def describe(self) -> str:
        """``meazo(beta=0.99, zeta=1e-08)``"""
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.hyper.items())})"


def mean_gradient(probe: Probe) -> Tensor:
    """Coefficients of the plain estimate ĝ = (1/q) Σ g_i z_i: float32 ``[queries]``."""
    return probe.projected_grad / probe.projected_grad.shape[0]


def combine(coefficients: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Σ_i coefficients[i] · tensors[i], added in this order."""
    total = coefficients[0] * tensors[0]
    for i in range(1, len(tensors)):
        total = total + coefficients[i] * tensors[i]
    return total


def received_share(beta: float, n: Tensor) -> Tensor:
    """1 − βⁿ, the weight of what an average with memory β has received after n values: Adam's bias correction.

    Through expm1, because 1 − 0.999 in float32 has an error of 3e-5.
    """
    return -torch.expm1(n * (math.log(beta) if beta else -math.inf))


def check_positive(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value is a positive finite number, in float32 too: there it is used."""
    float32 = torch.finfo(torch.float32)
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ZOError(f"{rule}: {name} must be a positive finite number, got {value!r}")
        if not float32.tiny <= value <= float32.max:
            raise ZOError(f"{rule}: {name} must lie in the range of float32, 1.2e-38 to 3.4e38, got {value!r}")


def check_fraction(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value lies in [0, 1)."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ZOError(f"{rule}: {name} must lie in [0, 1), got {value!r}")


def check_flag(rule: str, **values: bool) -> None:
    """Raise :class:`ZOError` unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ZOError(f"{rule}: {name} must be True or False, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
