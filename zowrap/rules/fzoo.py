"""FZOO normalises one-sided probes along random signs by the spread of their losses.

    θ ← θ − η Σ_i (l_i − l_0) u_i / (ε q σ),   l_0 = f(θ),  l_i = f(θ + ε u_i),  u_i ∈ {−1, 1}^d

with σ the standard deviation of l_1 … l_q (divided by q − 1); σ = 0 skips the step. Source: 2506.09034, Algorithm 1.

In terms of the projected gradients g_i = (l_i − l_0)/ε, σ is ε times their standard deviation. Computed this way, the
rule works with central differences as well.
"""

from __future__ import annotations

from zowrap.checks import check_positive
from zowrap.errors import ZOError
from zowrap.rules.base import Choice, Probe, Rule, Scalars, known, mean_gradient


@known
def fzoo(*, lr: float = 3e-7) -> Rule:
    """Zeroth-order descent whose step adapts to the spread of one batch of losses.

    It defaults to rademacher directions (cheap, and those of the derivation), the forward estimator and 8 queries:
    q + 1 forwards per step.

    Args:
        lr: η. Each weight moves about η/(ε√q) in a step whatever the loss's scale: 3e-7 makes that the 1e-4 of
            ``meazo`` at ε = 1e-3 and q = 8. Change it in proportion to ε.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("fzoo", lr=lr)

    def check(choice: Choice) -> None:
        if choice.population:
            raise ZOError(
                "fzoo compares directions on the same examples, but a population gives each example its own: use "
                "another estimator or rule"
            )
        if choice.queries < 2:
            raise ZOError(
                f"fzoo needs the spread of at least 2 losses: queries must be 2 or more, got {choice.queries}"
            )

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        g = probe.projected_grad
        off = g - g[0]  # exactly 0 if all are equal; subtracting their mean alone might leave a rounding error
        off = off - off.mean()
        sigma = hyper["eps"] * (off.square().sum() / (g.shape[0] - 1)).sqrt()
        return state, {"g": mean_gradient(probe) / sigma}  # σ = 0 gives a non-finite step, which is skipped

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        return w - hyper["lr"] * g, slots

    return Rule(
        name="fzoo",
        lr=lr,
        hyper={},
        scalars=scalars,
        leaf=leaf,
        defaults=Choice(direction="rademacher", estimator="forward", queries=8),
        check=check,
    )
