"""R-AdaZO computes the second moment from the first moment, whose variance is smaller than the estimate's.

    m ← β1 m + (1 − β1) ĝ,  v ← β2 v + (1 − β2) m²,  θ ← θ − η m / √(v + ζ)

where v uses the m just updated, without bias correction. Source: 2502.01014, Algorithm 1. Unlike its official code,
this uses one joint direction over all parameters and one update after all evaluations. ζ is inside the root, so the
denominator is at least √ζ and the rule does depend on the loss's scale where |m| is near 1e-4.

With independent directions Var(m) = (1 − β1)/(1 + β1) · Var(ĝ), so at the same η its steps are √((1 + β1)/(1 − β1))
times longer than ZO-AdaMM's, 4.36 for β1 = 0.9. Compare the two each at its own best η, not only at a common one.
"""

from __future__ import annotations

from zowrap.checks import check_flag, check_fraction, check_positive
from zowrap.rules.base import Probe, Rule, Scalars, Slot, known, mean_gradient, received_share


@known
def radazo(
    *, lr: float = 1e-4, beta1: float = 0.9, beta2: float = 0.99, zeta: float = 1e-8, bias_correction: bool = False
) -> Rule:
    """Adaptive zeroth-order descent with a variance-reduced second moment.

    Args:
        lr: η, about how far each weight moves in one step whatever the loss's scale; 1e-4 as for ``meazo``.
        beta1: β1 in [0, 1), the memory of m. The paper's.
        beta2: β2 in [0, 1), the memory of v. The paper's.
        zeta: ζ > 0, inside the root. The paper's.
        bias_correction: m / (1 − β1ⁿ) and v / (1 − β2ⁿ) in the step, n the number of estimates received.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("radazo", lr=lr, zeta=zeta)
    check_fraction("radazo", beta1=beta1, beta2=beta2)
    check_flag("radazo", bias_correction=bias_correction)

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        c = {"g": mean_gradient(probe)}
        if not bias_correction:
            return state, c
        n = state["n"] + 1
        return {"n": n}, {**c, "m": 1 / received_share(beta1, n), "v": 1 / received_share(beta2, n)}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        m = beta1 * slots["m"] + (1 - beta1) * g
        v = beta2 * slots["v"] + (1 - beta2) * (m * m)
        first, second = (m * c["m"], v * c["v"]) if bias_correction else (m, v)
        return w - hyper["lr"] * first / (second + zeta).sqrt(), {"m": m, "v": v}

    return Rule(
        name="radazo",
        lr=lr,
        hyper={"beta1": beta1, "beta2": beta2, "zeta": zeta, "bias_correction": bias_correction},
        scalars=scalars,
        leaf=leaf,
        state={"n": 0.0} if bias_correction else {},
        slots={"m": Slot(), "v": Slot()},
    )
