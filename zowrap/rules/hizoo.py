"""HiZOO shapes directions by a running estimate of the diagonal curvature.

    z = u / √H,   θ ← θ − η ĝ,   H ← (1 − a) H + a · |l₊ + l₋ − 2 l₀| / (2ε²) · H u²,   H = 1 at first

with l₀ = f(θ), l± = f(θ ± εz), and the same old H in the probe and in the update. With several queries H uses the mean
of their estimates. Source: 2402.15173, Algorithm 1 (its Σ is 1/H), and the official code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zowrap.checks import check_fraction, check_positive
from zowrap.errors import Option, ZOError
from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot, combine, known, mean_gradient
from zowrap.rules.estimators import ESTIMATORS, Point

CENTRAL = ESTIMATORS["central"]


@known
def hizoo(*, lr: float = 1e-6, a: float = 1e-8) -> Rule:
    """Zeroth-order descent preconditioned by a diagonal curvature estimate, for one more forward.

    Args:
        lr: η. 1e-6 as for ``zo_sgd``, which this equals at first, while H = 1.
        a: in [0, 1), the share of H that one step replaces. 1e-8 is the official code's: each single estimate is large
            and noisy (a difference of losses over ε²).

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("hizoo", lr=lr)
    check_fraction("hizoo", a=a)

    def check(choice: Choice) -> None:
        if choice.estimator != "central":
            raise ZOError(
                "hizoo measures curvature from both sides: ",
                Option("estimator"),
                f" must be 'central', got {choice.estimator!r}",
            )
        if choice.direction == "unit_sphere":
            raise ZOError("hizoo measures curvature with directions of length √d: use ", Option("direction", "sphere"))

    def points(queries: int) -> list[Point]:
        return [Point(0, 0.0), *CENTRAL.points(queries)]

    def project(losses: Tensor, eps: Tensor) -> Tensor:
        return CENTRAL.project(losses[1:], eps)

    def direction(u: Tensor, w: Tensor, slots: Scalars, s: Scalars) -> Tensor:
        return u / slots["H"].sqrt()

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        rise = probe.losses[1:] - probe.losses[0]  # subtract first: the losses are close, so this is exact
        curvature = (rise[0::2] + rise[1::2]).abs() / (2 * hyper["eps"].square())
        return state, {"g": mean_gradient(probe), "curvature": curvature / curvature.shape[0]}

    def leaf(w, z: Sequence[Tensor], slots: Scalars, c: Scalars, hyper: Scalars):
        h = slots["H"]
        square = combine(c["curvature"], [each * each for each in z])  # H u² = H² z²
        return w - hyper["lr"] * combine(c["g"], z), {"H": h + a * (h * h * square - h)}

    return Rule(
        name="hizoo",
        lr=lr,
        hyper={"a": a},
        scalars=scalars,
        leaf=leaf,
        leaf_takes_directions=True,
        slots={"H": Slot(initial=1.0)},
        points=points,
        project=project,
        check=check,
        direction=direction,
        direction_slots=("H",),
    )
