"""LOZO draws low-rank directions and keeps their right factor for ν steps, whose updates then share a subspace.

    Z = U Vᵀ per matrix,   θ ← θ − η g U Vᵀ / r          vectors: z gaussian, θ ← θ − η g z / r

with U drawn at every step and V at every ν-th. Each has its own random stream, so the update follows exactly the
probed direction, at resampling steps too. Source: 2410.07698, Algorithm 1; the official code omits the 1/r
(``scale="code"``).

LOZO-M keeps a momentum in the factored form (same paper, Algorithm 2), one matrix of U's shape:

    N ← β N + (1 − β) g U,   θ ← θ − η N Vᵀ / r,   N ← N (V_oldᵀ V_new) / n when V changes, n its number of rows

For a vector N has its shape and V is 1.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from zowrap.checks import check_count, check_fraction, check_positive
from zowrap.errors import Option, ZOError, nearest
from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot, known
from zowrap.rules.zo_sgd import zo_sgd

SCALES = ("paper", "code")


@known
def lozo(*, lr: float = 1e-6, rank: int = 2, nu: int = 50, scale: str = "paper") -> Rule:
    """MeZO with low-rank directions that stay in one subspace for ν steps.

    Args:
        lr: η. 1e-6 as for ``zo_sgd``; the paper's grid is 1e-7 to 1e-6.
        rank: r of every matrix. The paper uses 1 to 4, for most tasks 2.
        nu: ν, the number of steps between draws of V. The paper uses 50 or 100.
        scale: ``"paper"`` divides the update by r; ``"code"`` does not.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("lozo", lr=lr)
    return dataclasses.replace(
        _with_lowrank_directions(zo_sgd(lr=lr), "lozo", rank, nu, scale),
        name="lozo",
        hyper={"rank": rank, "nu": nu, "scale": scale},
    )


@known
def lozo_m(*, lr: float = 1e-6, rank: int = 2, nu: int = 50, scale: str = "paper", beta1: float = 0.9) -> Rule:
    """LOZO with momentum in factored form: one matrix of U's shape.

    Args:
        lr, rank, nu, scale: as for ``lozo``.
        beta1: β in [0, 1), the memory of N. 0.9 is the paper's.

    Raises:
        ZOError: a value outside its range.
    """
    check_positive("lozo_m", lr=lr)
    check_fraction("lozo_m", beta1=beta1)
    plain = zo_sgd(lr=lr)

    def scalars(state: Scalars, probe: Probe, hyper: Scalars) -> tuple[Scalars, Scalars]:
        _, coefficients = plain.scalars({}, probe, hyper)
        return {"epoch": torch.floor(probe.step / nu)}, coefficients

    def left(n: Tensor, g_left: Tensor, c: Scalars) -> Tensor:
        return beta1 * n + (1 - beta1) * g_left

    return dataclasses.replace(
        _with_lowrank_directions(plain, "lozo_m", rank, nu, scale),
        name="lozo_m",
        hyper={"rank": rank, "nu": nu, "scale": scale, "beta1": beta1},
        scalars=scalars,
        state={"epoch": 0.0},
        slots={"N": Slot(kind="left")},
        left=left,
    )


def _with_lowrank_directions(rule: Rule, name: str, rank: int, nu: int, scale: str) -> Rule:
    check_count(name, rank=rank, nu=nu)
    if scale not in SCALES:
        raise ZOError(f"{name}: unknown scale {scale!r}{nearest(scale, SCALES)}")
    own = f"lozo({rank}, {nu}, {scale})"

    def check(choice: Choice) -> None:
        if choice.population:
            raise ZOError(
                f"{name} keeps the factors of a single direction, so it cannot run a population: use another "
                "rule, for example zo_sgd with ",
                Option("direction", f"lowrank({rank}, nu={nu})"),
            )
        if choice.direction != own:
            raise ZOError(
                f"{name} draws its own low-rank directions, with its rank and nu: leave direction out, or use "
                "another rule with ",
                Option("direction", choice.direction),
            )

    return dataclasses.replace(rule, defaults=Choice(direction=own), check=check)
