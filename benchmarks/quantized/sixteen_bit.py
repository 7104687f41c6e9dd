"""Compare ways to round and move 16-bit weights, on a quadratic whose weights are as large as those of a model.

    f(w) = ½ Σ (w − w*)²      three quarters of the weights are N(0, 0.05²), as in matrices; a quarter are near 1, as
                              the gains of normalisation layers are;  w* is 0.05 away from the start in each of them

In bfloat16 a weight near 1 moves in steps of 0.004 to 0.008: with an ε of 1e-3 both evaluations leave it unchanged, and
yet the update along the drawn direction moves it. Every line makes the same number of forwards, with the best η of a
grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import zowrap

SIZE, STEPS = 1000, 3000
GRID = (0.25, 0.5, 1.0)  # of η in units of the best one in exact arithmetic, 1 / (d + 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic rounding": {},
    "bfloat16, stochastic rounding, along=evaluated": {"along": "evaluated"},
    "bfloat16, masters": {"masters": True},
    "bfloat16, masters, along=evaluated": {"masters": True, "along": "evaluated"},
}


class Quadratic(nn.Module):
    """Weights ``w`` of the given dtype and their ``goal`` in float32, both ``[SIZE]``."""

    goal: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(SIZE, generator=draw) * 0.05
        start[: SIZE // 4] += 1.0
        away = torch.where(torch.rand(SIZE, generator=draw) < 0.5, -0.05, 0.05)
        self.register_buffer("goal", start + away)
        self.w = nn.Parameter(start.to(dtype))


def distance(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """f."""
    return 0.5 * (model.w.float() - model.goal).square().sum() * batch["one"]  # type: ignore[operator]


@torch.no_grad()
def descend(name: str, eps: float, share: float, steps: int = STEPS) -> float:
    """Run a descent, and return f at the end divided by f at the start."""
    model = Quadratic(torch.float32 if name == "float32" else torch.bfloat16)
    batch = {"one": torch.ones(())}
    zm = zowrap.zo_wrap(
        model, "zo_sgd", lr=share / (SIZE + 2), eps=eps, loss_fn=distance, engine="eager", **VARIANTS[name]
    )
    first = float(distance(model, batch))
    for _ in range(steps):
        zm.step(**batch)
    return float(distance(model, batch)) / first


def measure(steps: int = STEPS) -> list[dict[str, Any]]:
    """Measure every variant at every ε, with the best η of the grid, and return one line for each."""
    lines = []
    for eps in (1e-3, 1e-2):
        for name in VARIANTS:
            ends = {share: descend(name, eps, share, steps) for share in GRID}
            best = min(ends, key=lambda share: ends[share])
            lines.append({"way": name, "eps": eps, "forwards": 2 * steps, "share": best, "left": ends[best]})
    return lines
