"""ZO-SGD, known as MeZO, is gradient descent on the zeroth-order estimate.

    θ ← θ − η ĝ                         momentum=μ:        b ← μ b + ĝ,  θ ← θ − η b
                                        sign="scalar":      θ ← θ − η mean_i sign(g_i) z_i
                                        sign="elementwise": θ ← θ − η sign(ĝ)
                                        conservative=True:  θ ← the best of θ, θ − η g z, θ + η g z by the loss

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (2305.17333), Algorithm 1; sign variants as in
ZO-signSGD (Liu et al. 2019), the conservative step as in ZO-SGD-Cons (Kim et al. 2021, as benchmarked by Zhang et al.
2402.11592). Momentum follows torch.optim.SGD (no dampening).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.checks import check_flag, check_fraction, check_positive
from zowrap.errors import ZOError, nearest
from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot, known

SIGNS = ("scalar", "elementwise")


@known
def zo_sgd(*, lr: float = 1e-6, momentum: float = 0.0, sign: str | None = None, conservative: bool = False) -> Rule:
    """Plain zeroth-order gradient descent.

    Args:
        lr: η. 1e-6 is the paper's for full tuning of OPT and RoBERTa-large; adapters need about 1e-4.
        momentum: μ in [0, 1); 0 keeps no state, otherwise one float32 buffer of the parameters' size.
        sign: ``None``, ``"scalar"`` (sign of each projected gradient) or ``"elementwise"`` (sign of ĝ).
        conservative: evaluate three more points per step, θ and the end of the step in either sense, and keep the one
            with the lowest loss (θ if it ties). One query only, without momentum or elementwise signs.

    Raises:
        ZOError: a value outside its range, or an option that conservative steps do not support.
    """
    check_positive("zo_sgd", lr=lr)
    check_flag("zo_sgd", conservative=conservative)
    check_fraction("zo_sgd", momentum=momentum)
    if sign is not None and sign not in SIGNS:
        raise ZOError(f"zo_sgd: unknown sign {sign!r}{nearest(sign, SIGNS)}")

    if conservative and (momentum or sign == "elementwise"):
        raise ZOError("zo_sgd: conservative=True works with neither momentum nor sign='elementwise'")

    def check(choice: Choice) -> None:
        if conservative and (choice.queries > 1 or choice.population):
            raise ZOError(
                "zo_sgd: conservative=True compares losses along one direction: use queries=1 and no population"
            )

    def length(g: Tensor) -> Tensor:
        return g.sign() if sign == "scalar" else g

    def candidates(g: Tensor, hyper: Scalars) -> Tensor:
        return torch.cat([step * hyper["lr"] * length(g) for step in (0.0, -1.0, 1.0)])

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        g = probe.weights * length(probe.projected_grad)
        if conservative:
            best = probe.candidates.argmin()
            g = g * ((best == 1).to(g.dtype) - (best == 2).to(g.dtype))
        return state, {"g": g}

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
        hyper={"momentum": momentum, "sign": sign, "conservative": conservative},
        scalars=scalars,
        leaf=leaf,
        slots={"b": Slot()} if momentum else {},
        check=check,
        candidates=candidates if conservative else None,
    )
