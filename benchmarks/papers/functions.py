"""Define the test functions of the toy experiments: ``f(x, data) -> 0-d`` for float64 ``x`` ``[d]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.papers.cells import Objective
from zowrap.rules import Scalars


def quadratic(curvatures: Tensor) -> Objective:
    """½ Σ λ_i x_i², with λ float64 ``[d]``."""

    def objective(x: Tensor, data: Scalars) -> Tensor:
        return 0.5 * (curvatures * x * x).sum()

    return objective


def sphere(x: Tensor, data: Scalars) -> Tensor:
    """½ Σ x²."""
    return 0.5 * (x * x).sum()


def cubic(x: Tensor, data: Scalars) -> Tensor:
    """Σ |x|³ + x²/2."""
    return (x.abs() ** 3 + 0.5 * x * x).sum()


def levy(x: Tensor, data: Scalars) -> Tensor:
    """Levy's function, with w = 1 + (x − 1)/4."""
    w = 1 + (x - 1) / 4
    inner = ((w[:-1] - 1) ** 2 * (1 + 10 * torch.sin(math.pi * w[:-1] + 1) ** 2)).sum()
    last = (w[-1] - 1) ** 2 * (1 + torch.sin(2 * math.pi * w[-1]) ** 2)
    return torch.sin(math.pi * w[0]) ** 2 + inner + last


def rosenbrock(x: Tensor, data: Scalars) -> Tensor:
    """Σ 100 (x_{i+1} − x_i²)² + (1 − x_i)²."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def normal_starts(seeds: Sequence[int], size: int, norm: float | None = None) -> Tensor:
    """float32 ``[seeds, size]``: x_0 ~ N(0, I) of each seed, scaled to ``norm`` where one is given."""
    rows = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return rows if norm is None else rows * (norm / rows.norm(dim=-1, keepdim=True))
