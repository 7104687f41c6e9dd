"""ZO-SGD, known as MeZO.

    θ ← θ − η ĝ                         momentum=μ:        b ← μ b + ĝ,  θ ← θ − η b
                                        sign="scalar":      θ ← θ − η mean_i sign(g_i) z_i
                                        sign="elementwise": θ ← θ − η sign(ĝ)

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2305.17333), Algorithm 1; sign variants as in
ZO-signSGD (Liu et al. 2019). Momentum follows torch.optim.SGD (no dampening).
"""

from __future__ import annotations

import torch

from zowrap.errors import ZOError, nearest
from zowrap.rules.base import Probe, Rule, Scalars, Slot, check_fraction, check_positive, mean_gradient

SIGNS = ("scalar", "elementwise")


def zo_sgd(*, lr: float = 1e-6, momentum: float = 0.0, sign: str | None = None) -> Rule:
    """Plain zeroth-order gradient descent.

    Args:
        lr: η. 1e-6 is the paper's for full tuning of OPT and RoBERTa-large; adapters take about 1e-4.
        momentum: μ in [0, 1); 0 keeps no state, otherwise one float32 buffer of the parameters' size.
        sign: ``None``, ``"scalar"`` (sign of each projected gradient) or ``"elementwise"`` (sign of ĝ).

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("zo_sgd", lr=lr)
    check_fraction("zo_sgd", momentum=momentum)
    if sign is not None and sign not in SIGNS:
        raise ZOError(f"zo_sgd: unknown sign {sign!r}{nearest(sign, SIGNS)}")

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        g = mean_gradient(probe)
        return state, {"g": g.sign() / g.shape[0] if sign == "scalar" else g}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        if sign == "elementwise":
            g = torch.sign(g)
        if momentum:
            g = momentum * slots["b"] + g
            slots = {"b": g}
        return w - hyper["lr"] * g, slots

    return Rule(
        name="zo_sgd",
        lr=lr,
        hyper={"momentum": momentum, "sign": sign},
        scalars=scalars,
        leaf=leaf,
        slots={"b": Slot()} if momentum else {},
    )
