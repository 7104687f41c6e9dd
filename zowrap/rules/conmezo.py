"""ConMeZO draws directions from a cone around the momentum.

    z = √d cosθ · m / ‖m‖ + sinθ · u,   θ ← θ − η ĝ,   m ← β m + (1 − β) ĝ,   ĝ = g z

with u ~ N(0, I), not projected orthogonal to m, and d, m and ‖m‖ over all tunable parameters together (those of the
active block). While ‖m‖ < 1e-8, as at the first step, z = u. Source: 2511.02757, Algorithm 1 and the official code.

β warm-up over T steps: with t = 1, 2, … the step, β_t = 0.1 while t ≤ T/100; then β − (β − 0.1)/(1 + 8p)³ with
p = ((t − T/100)/(0.09 T))^1.8 until T/10; then β. T is kept in the rule's state.

The cone is a direction, so other rules can use it too: ``direction="cone"`` gives them its momentum (of the plain ĝ,
whatever the rule does with ĝ), and ``conmezo`` is ``zo_sgd`` with that direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.checks import check_fraction, check_positive
from zowrap.errors import Option, ZOError
from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot, combine, identity, known, mean_gradient
from zowrap.rules.zo_sgd import zo_sgd

NO_MOMENTUM = 1e-8  # below this ‖m‖ there is no cone yet; the value of the official code
BETA_START = 0.1


@known
def conmezo(*, lr: float = 1e-6, theta: float = 1.35, beta: float = 0.99, warmup: bool | int = False) -> Rule:
    """MeZO with directions within an angle of its own momentum.

    Args:
        lr: η. 1e-6 as for ``zo_sgd``: the directions have the same length.
        theta: θ in (0, π/2], the half-angle of the cone in radians; π/2 is MeZO exactly. 1.35 is the paper's.
        beta: β in [0, 1), the memory of m. 0.99 is the paper's for OPT; it uses 0.95 for RoBERTa-large.
        warmup: T, the planned number of steps, over which β warms up; False keeps β constant.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("conmezo", lr=lr)
    along = with_cone_directions(zo_sgd(lr=lr), theta=theta, beta=beta, warmup=warmup, slot="m", name="conmezo")
    return dataclasses.replace(along, name="conmezo", hyper={"theta": theta, "beta": beta, "warmup": warmup})


@known
def with_cone_directions(
    rule: Rule,
    *,
    theta: float = 1.35,
    beta: float = 0.99,
    warmup: bool | int = False,
    slot: str = "cone",
    name: str = "direction 'cone'",
) -> Rule:
    """Make ``rule`` draw its directions from the cone around its own momentum.

    Args:
        theta, beta, warmup: see :func:`conmezo`.
        slot: the name of the momentum in the rule's state.
        name: the subject of error messages.

    Raises:
        ZOError: a value outside its range, or a rule that shapes its directions itself.
    """
    check_cone(name, theta, beta, warmup)
    if rule.direction is not identity:
        raise ZOError(f"{rule.name} shapes its directions itself, so it cannot use ", Option("direction", "cone"))
    along, across = math.sin(math.pi / 2 - theta), math.sin(theta)  # cosθ, exactly 0 at π/2

    def check(choice: Choice) -> None:
        if choice.direction == "unit_sphere":
            raise ZOError(
                f"{name} mixes its momentum with directions of length √d: use ",
                Option("direction", "sphere"),
                " instead",
            )
        rule.check(choice)

    def reduce(slots: Scalars) -> Scalars:
        return {"square": slots[slot].square()}

    def direction_scalars(state: Scalars, sums: Scalars, hyper: Scalars) -> Scalars:
        norm = sums["square"].sqrt()
        ready = norm >= NO_MOMENTUM
        momentum = along * sums["count"].sqrt() / norm.clamp(min=NO_MOMENTUM)
        noise = torch.full_like(norm, across)
        return {
            "momentum": torch.where(ready, momentum, torch.zeros_like(norm)).float(),
            "noise": torch.where(ready, noise, torch.ones_like(norm)).float(),
        }

    def direction(u: Tensor, w: Tensor, slots: Scalars, s: Scalars) -> Tensor:
        return s["momentum"] * slots[slot] + s["noise"] * u

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        inner = {n: v for n, v in state.items() if n != "warmup"}
        new_state, coefficients = rule.scalars(inner, probe, hyper)
        planned, t = state["warmup"], probe.step + 1
        length = planned.clamp(min=1)
        p = ((t - length / 100) / (0.09 * length)).clamp(min=0) ** 1.8
        missing = (beta - BETA_START) / (1 + 8 * p) ** 3
        missing = torch.where((planned == 0) | (t > length / 10), torch.zeros_like(t), missing)
        # 1 − β_t is formed without the cancellation of 1 − (β − missing).
        cone = {"plain": mean_gradient(probe), "keep": beta - missing, "take": (1 - beta) + missing}
        return {**new_state, "warmup": planned}, {**coefficients, **cone}

    def leaf(w, z: Sequence[Tensor], slots: Scalars, c: Scalars, hyper: Scalars):
        m = c["keep"] * slots[slot] + c["take"] * combine(c["plain"], z)
        inner = {n: v for n, v in slots.items() if n != slot}
        w, inner = rule.leaf(w, z if rule.leaf_takes_directions else combine(c["g"], z), inner, c, hyper)
        return w, {**inner, slot: m}

    return dataclasses.replace(
        rule,
        scalars=scalars,
        leaf=leaf,
        leaf_takes_directions=True,
        state={**rule.state, "warmup": float(warmup)},
        slots={**rule.slots, slot: Slot()},
        check=check,
        direction=direction,
        direction_slots=(slot,),
        direction_scalars=direction_scalars,
        reduce=reduce,
    )


def check_cone(name: str, theta: float, beta: float, warmup: bool | int) -> None:
    """Raise :class:`ZOError` for a value outside its range."""
    check_positive(name, theta=theta)
    check_fraction(name, beta=beta)
    if theta > math.pi / 2:
        raise ZOError(Option("theta", rule=name), f" must lie in (0, π/2], got {theta!r}")
    if warmup is not False and (not isinstance(warmup, int) or warmup is True or warmup < 1):
        raise ZOError(Option("warmup", rule=name), f" must be False or a whole number of steps from 1, got {warmup!r}")
