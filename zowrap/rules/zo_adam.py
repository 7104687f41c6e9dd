"""ZO-Adam runs Adam on the zeroth-order estimate.

    m ← β1 m + (1 − β1) ĝ,  v ← β2 v + (1 − β2) ĝ²,  θ ← θ − η m̂ / (√v̂ + ζ)

with m̂ = m / (1 − β1ⁿ), v̂ = v / (1 − β2ⁿ) and n the number of estimates so far. Kingma & Ba (1412.6980), Algorithm 1,
with ĝ in place of the gradient; ZO-AdaMM (1910.06513) discusses the family.
"""

from __future__ import annotations

from zowrap.checks import check_fraction, check_positive
from zowrap.rules.base import Probe, Rule, Scalars, Slot, known, mean_gradient, received_share


@known
def zo_adam(*, lr: float = 1e-4, beta1: float = 0.9, beta2: float = 0.999, zeta: float = 1e-8) -> Rule:
    """Adam on the zeroth-order estimate: two moments per element.

    Args:
        lr: η, about how far each weight moves in one step whatever the loss's scale; 1e-4 as for ``meazo``.
        beta1: β1 in [0, 1), the memory of m. Adam's own default.
        beta2: β2 in [0, 1), the memory of v. Adam's own default.
        zeta: ζ > 0 keeps the quotient finite where v is 0. Adam's own default.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("zo_adam", lr=lr, zeta=zeta)
    check_fraction("zo_adam", beta1=beta1, beta2=beta2)

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        n = state["n"] + 1
        corrections = {"m": 1 / received_share(beta1, n), "v": 1 / received_share(beta2, n)}
        return {"n": n}, {"g": mean_gradient(probe), **corrections}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        m = beta1 * slots["m"] + (1 - beta1) * g
        v = beta2 * slots["v"] + (1 - beta2) * (g * g)
        return w - hyper["lr"] * (m * c["m"]) / ((v * c["v"]).sqrt() + zeta), {"m": m, "v": v}

    return Rule(
        name="zo_adam",
        lr=lr,
        hyper={"beta1": beta1, "beta2": beta2, "zeta": zeta},
        scalars=scalars,
        leaf=leaf,
        state={"n": 0.0},
        slots={"m": Slot(), "v": Slot()},
    )
