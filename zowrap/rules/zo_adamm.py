"""ZO-AdaMM is the AMSGrad form of ZO-Adam.

    m ← β1 m + (1 − β1) ĝ,  v ← β2 v + (1 − β2) ĝ²,  s ← max(s, v),  θ ← θ − η m / (√s + ζ)

without bias correction. Chen et al. (1910.06513), Algorithm 1, unconstrained. ``amsgrad=False`` uses s = v, which is
the baseline of R-AdaZO (2502.01014).
"""

from __future__ import annotations

import torch

from zowrap.checks import check_flag, check_fraction, check_positive
from zowrap.rules.base import Probe, Rule, Scalars, Slot, known, mean_gradient


@known
def zo_adamm(
    *, lr: float = 1e-4, beta1: float = 0.9, beta2: float = 0.99, zeta: float = 1e-8, amsgrad: bool = True
) -> Rule:
    """Zeroth-order AMSGrad: two moments per element and the running maximum of the second.

    Args:
        lr: η, about how far each weight moves in one step whatever the loss's scale; 1e-4 as for ``meazo``.
        beta1: β1 in [0, 1), the memory of m.
        beta2: β2 in [0, 1), the memory of v. With 0.9 and 0.99 the first step is (1 − β1)/√(1 − β2) = 1 times
            η·sign(ĝ), so the rule does without bias correction; R-AdaZO compares at these values too.
        zeta: ζ > 0 keeps the quotient finite where v is 0.
        amsgrad: keep the running maximum of v, a third buffer.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("zo_adamm", lr=lr, zeta=zeta)
    check_fraction("zo_adamm", beta1=beta1, beta2=beta2)
    check_flag("zo_adamm", amsgrad=amsgrad)

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        return state, {"g": mean_gradient(probe)}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        m = beta1 * slots["m"] + (1 - beta1) * g
        v = beta2 * slots["v"] + (1 - beta2) * (g * g)
        new = {"m": m, "v": v}
        if amsgrad:
            new["max"] = torch.maximum(slots["max"], v)
        return w - hyper["lr"] * m / (new.get("max", v).sqrt() + zeta), new

    return Rule(
        name="zo_adamm",
        lr=lr,
        hyper={"beta1": beta1, "beta2": beta2, "zeta": zeta, "amsgrad": amsgrad},
        scalars=scalars,
        leaf=leaf,
        slots={name: Slot() for name in (("m", "v", "max") if amsgrad else ("m", "v"))},
    )
