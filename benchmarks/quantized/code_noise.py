"""Measure the noise of stochastically rounded codes on a quadratic, and the effect of remedies.

    f(W) = ½ ‖W − W*‖²,  W = codes · unit, 96 × 96;  W* is about 10 steps of a code away from the start

Every line makes the same number of forwards, with exact projected gradients and the best η of a grid. ``held`` is the
number of directions whose updates are kept as (key, number) pairs, and added to W when it is evaluated, before they are
written together: error feedback without a buffer, at the price of drawing them again. ``sparse`` is the random share of
the weights that moves in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zowrap.numerics import codes

SIDE, STEPS_AWAY = 96, 10.0
GRID = (0.25, 0.5, 1.0)  # of η in units of the best one in exact arithmetic, q / (d + q + 1)


@dataclass(frozen=True)
class Remedy:
    """A way to write the updates: in exact arithmetic, or as codes with one of the remedies."""

    name: str
    rounded: bool = True
    queries: int = 1
    held: int = 1
    sparse: float = 1.0


REMEDIES = (
    Remedy("exact arithmetic", rounded=False),
    Remedy("one direction per write"),
    Remedy("8 queries per write", queries=8),
    Remedy("64 queries per write", queries=64),
    Remedy("8 directions held", held=8),
    Remedy("64 directions held", held=64),
    Remedy("a tenth of the weights", sparse=0.1),
)


def descend(remedy: Remedy, forwards: int, share: float, seed: int = 0) -> float:
    """Run a descent, and return f at the end divided by f at the start."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(SIDE, SIDE, generator=draw) * 0.02
    unit = codes.unit_of(start.abs().amax(dim=1))
    stored = (start / unit.unsqueeze(1)).round().to(torch.int8)
    target = codes.dequantize(stored, unit) + STEPS_AWAY * unit.mean() * torch.randn(SIDE, SIDE, generator=draw)
    w, pending = codes.dequantize(stored, unit), torch.zeros(SIDE, SIDE)
    first = (w - target).square().sum()
    moving = round(remedy.sparse * w.numel())
    eta = share * remedy.queries / (moving + remedy.queries + 1)
    for step in range(forwards // (2 * remedy.queries)):
        mask = torch.rand(SIDE, SIDE, generator=draw) < remedy.sparse if remedy.sparse < 1 else None
        change = torch.zeros(SIDE, SIDE)
        for _ in range(remedy.queries):
            z = torch.randn(SIDE, SIDE, generator=draw)
            z = z if mask is None else z * mask
            change -= eta / remedy.queries * ((w + pending - target) * z).sum() * z
        pending += change
        if (step + 1) % remedy.held == 0:
            w, stored = _write(remedy, w, stored, pending, unit, draw)
            pending = torch.zeros(SIDE, SIDE)
    return float((w + pending - target).square().sum() / first)


def _write(
    remedy: Remedy, w: Tensor, stored: Tensor, change: Tensor, unit: Tensor, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    if not remedy.rounded:
        return w + change, stored
    bits = torch.randint(-(2**31), 2**31, stored.shape, generator=draw, dtype=torch.int64).to(torch.int32)
    stored = codes.add_change(stored, change, unit, bits, torch.tensor(True))
    return codes.dequantize(stored, unit), stored


def measure(forwards: int = 8_000) -> list[dict[str, Any]]:
    """Measure every remedy, with the best η of the grid, and return one line for each."""
    lines = []
    for remedy in REMEDIES:
        ends = {share: descend(remedy, forwards, share) for share in GRID}
        best = min(ends, key=lambda share: ends[share])
        lines.append({"remedy": remedy.name, "forwards": forwards, "share": best, "left": ends[best]})
    return lines
