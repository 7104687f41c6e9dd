"""ZO-Lion: a rule of your own. Lion (2302.06675, Algorithm 2) fed with the zeroth-order estimate ĝ:

θ ← θ − η sign(β1 m + (1 − β1) ĝ),   m ← β2 m + (1 − β2) ĝ
"""

from zowrap import rules
from zowrap.rules.base import Rule, Slot, check_fraction, check_positive, mean_gradient


def zo_lion(*, lr: float = 1e-4, beta1: float = 0.9, beta2: float = 0.99) -> Rule:
    """Sign descent along a momentum: each weight moves by η in every step."""
    check_positive("zo_lion", lr=lr)
    check_fraction("zo_lion", beta1=beta1, beta2=beta2)

    def scalars(state, probe, hyper):  # once per step, from its losses
        return state, {"g": mean_gradient(probe)}

    def leaf(w, g, slots, c, hyper):  # once per parameter, traced into one fused kernel
        m = slots["m"]
        ahead = beta1 * m + (1 - beta1) * g
        return w - hyper["lr"] * ahead.sign(), {"m": beta2 * m + (1 - beta2) * g}

    hyper = {"beta1": beta1, "beta2": beta2}
    return Rule(name="zo_lion", lr=lr, hyper=hyper, scalars=scalars, leaf=leaf, slots={"m": Slot()})


rules.register("zo_lion", zo_lion, paper="2302.06675", scale_free=True)
