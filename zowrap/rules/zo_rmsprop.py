"""ZO-RMSProp is ZO-Adam without the first moment (β1 = 0).

    v ← β2 v + (1 − β2) ĝ²,  θ ← θ − η ĝ / (√v̂ + ζ),   v̂ = v / (1 − β2ⁿ)

with n the number of estimates so far. Tieleman & Hinton (2012) with ĝ in place of the gradient and Adam's bias
correction, without which the first step would be 1/√(1 − β2) times too long. 1910.06513 and 2502.01014 use it as a
baseline.
"""

from __future__ import annotations

from zowrap.checks import check_fraction, check_positive
from zowrap.rules.base import Probe, Rule, Scalars, Slot, known, mean_gradient, received_share


@known
def zo_rmsprop(*, lr: float = 1e-4, beta2: float = 0.99, zeta: float = 1e-8) -> Rule:
    """Zeroth-order descent normalised by a second moment per element.

    Args:
        lr: η, about how far each weight moves in one step whatever the loss's scale; 1e-4 as for ``meazo``.
        beta2: β2 in [0, 1), the memory of v. 0.99 is ``torch.optim.RMSprop``'s smoothing constant.
        zeta: ζ > 0 keeps the quotient finite where v is 0.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("zo_rmsprop", lr=lr, zeta=zeta)
    check_fraction("zo_rmsprop", beta2=beta2)

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        n = state["n"] + 1
        return {"n": n}, {"g": mean_gradient(probe), "v": 1 / received_share(beta2, n)}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        v = beta2 * slots["v"] + (1 - beta2) * (g * g)
        return w - hyper["lr"] * g / ((v * c["v"]).sqrt() + zeta), {"v": v}

    return Rule(
        name="zo_rmsprop",
        lr=lr,
        hyper={"beta2": beta2, "zeta": zeta},
        scalars=scalars,
        leaf=leaf,
        state={"n": 0.0},
        slots={"v": Slot()},
    )
