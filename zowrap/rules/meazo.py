"""MEAZO normalises steps as Adam does, with one scalar of state.

    v ← β v + (1 − β) s,   v̂ = v / (1 − βⁿ),   θ ← θ − η / (√v̂ + ζ) · ĝ

with n the number of values in v and s = Σ_i (w_i g_i)², which is (mean_i g_i²) / q for q queries (w_i = 1/q; for a
population, the example's share). With blocks, each block has its own v and n.

Source: 2605.03869, the algorithm box. The paper prints v̂ = v/(1 − β^(t−1)), which is undefined at t = 1;
``literal=True`` reads that as max(n − 1, 1). It also prints s = (mean_i g_i)², which for q > 1 can be near 0 while the
g_i are not (we measured first steps a thousand times too long); ``moment="printed"`` uses that form. For q = 1 both
agree and the first step is η·sign(g)·z.
"""

from __future__ import annotations

from zowrap.checks import check_flag, check_fraction, check_positive
from zowrap.errors import Option, ZOError, nearest
from zowrap.rules.base import Choice, Probe, Rule, Scalars, known, mean_gradient, received_share

MOMENTS = ("mean", "printed")


@known
def meazo(
    *,
    lr: float = 1e-4,
    beta: float = 0.99,
    zeta: float = 1e-8,
    moment: str = "mean",
    literal: bool = False,
    groups: bool = False,
) -> Rule:
    """Zeroth-order descent normalised by a running second moment of the projected gradient.

    Args:
        lr: η, about how far each weight moves in one step whatever the loss's scale. 1e-4 is 1/200 of the standard
            deviation (0.02) that transformer weights are initialised with.
        beta: β in [0, 1), the memory of v: 0.99 averages about 100 steps.
        zeta: ζ > 0 keeps the quotient finite on a flat loss.
        moment: ``"mean"`` or ``"printed"``, see above.
        literal: the printed bias correction.
        groups: require a v for each group of parameters. Groups are the ``blocks`` of ``zo_wrap``, each of which has
            its own v in any case; without blocks this raises an error.

    Raises:
        ZOError: a value outside its range; ``groups`` without blocks.
    """
    check_positive("meazo", lr=lr, zeta=zeta)
    check_flag("meazo", literal=literal, groups=groups)
    check_fraction("meazo", beta=beta)
    if moment not in MOMENTS:
        raise ZOError(f"meazo: unknown moment {moment!r}{nearest(moment, MOMENTS)}")

    def check(choice: Choice) -> None:
        if groups and choice.blocks == 1:
            raise ZOError(
                "meazo: groups=True needs blocks, because one joint probe gives every group the same v: add ",
                Option("blocks", "layer"),
                " or a list of name patterns",
            )

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        g = probe.projected_grad
        square = (g * probe.weights).sum().square() if moment == "printed" else (g * probe.weights).square().sum()
        v = beta * state["v"] + (1 - beta) * square
        n = state["n"] + 1
        corrected = v / received_share(beta, (n - 1).clamp(min=1) if literal else n)
        return {"v": v, "n": n}, {"g": mean_gradient(probe) / (corrected.sqrt() + zeta)}

    def leaf(w, g, slots: Scalars, c: Scalars, hyper: Scalars):
        return w - hyper["lr"] * g, slots

    return Rule(
        name="meazo",
        lr=lr,
        hyper={"beta": beta, "zeta": zeta, "moment": moment, "literal": literal, "groups": groups},
        scalars=scalars,
        leaf=leaf,
        state={"v": 0.0, "n": 0.0},
        check=check,
    )
