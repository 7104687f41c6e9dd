"""bfloat16 weights learn at steps far below their resolution: stochastic rounding does, round-to-nearest does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zowrap
from zowrap import rounding

DIMENSION, STEPS, LR, EPS = 24, 500, 4e-4, 0.05


class Point(nn.Module):
    """f(w) = ½ Σ (w − w*)², a quarter away from its minimum in every coordinate; weights in [0.5, 1)."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        start = torch.rand(DIMENSION, generator=draw) * 0.2 + 0.7
        away = torch.where(torch.rand(DIMENSION, generator=draw) < 0.5, -0.15, 0.15)
        self.register_buffer("minimum", start + away)
        self.w = nn.Parameter(start.to(dtype))


def distance(model: nn.Module, inputs: dict) -> torch.Tensor:
    return 0.5 * (model.w.float() - model.minimum).square().sum() * inputs["one"]


def train(dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """Final loss, and the median size of a single element's step in units of a bfloat16 ulp of the median weight."""
    zm = zowrap.zo_wrap(Point(dtype, seed), "zo_sgd", lr=LR, eps=EPS, seed=seed, loss_fn=distance, engine="eager")
    sizes = []
    for _ in range(STEPS):
        (stream,) = zm._streams.queries
        z = zm._engine.direction(stream, 0)
        result = zm.step(one=torch.ones(()))
        sizes.append((LR * result.projected_grad * z).abs())
    ulp = 2.0**-8  # of bfloat16 in [0.5, 1)
    return zm.loss(one=torch.ones(())).item(), torch.cat(sizes).median().item() / ulp


def test_bfloat16_reaches_the_float32_loss(monkeypatch) -> None:
    full = [train(torch.float32, seed)[0] for seed in range(3)]
    runs = [train(torch.bfloat16, seed) for seed in range(3)]
    assert all(size <= 1 / 8 for _, size in runs)
    spread = max(full) - min(full)
    start = 0.5 * DIMENSION * 0.15**2
    mean_full, mean_stochastic = sum(full) / 3, sum(loss for loss, _ in runs) / 3
    assert mean_full < 0.9 * start
    assert abs(mean_stochastic - mean_full) <= spread
    monkeypatch.setattr(rounding, "stochastic", lambda value, bits, dtype: value.to(dtype))
    nearest = [train(torch.bfloat16, seed)[0] for seed in range(3)]
    assert sum(nearest) / 3 > mean_full + 2 * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_engines_round_the_same_way(dtype) -> None:
    models = []
    for engine in ("eager", "compiled"):
        zm = zowrap.zo_wrap(Point(dtype, 0), "zo_sgd", lr=LR, eps=EPS, loss_fn=distance, engine=engine)
        for g in (1.0, -0.3, 2.5):
            zm.update(projected_grad=torch.tensor(g))
        models.append(zm.model.w.detach().clone())
        assert zm.model.w.dtype == dtype
    assert torch.equal(*models)


def test_rule_state_is_float32_whatever_the_weights() -> None:
    zm = zowrap.zo_wrap(Point(torch.bfloat16, 0), zowrap.rules.zo_sgd(momentum=0.9), loss_fn=distance, engine="eager")
    assert all(v.dtype == torch.float32 for v in zm.state_dict().values() if isinstance(v, torch.Tensor))
