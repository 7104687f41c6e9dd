"""How far a rule carries the weights: rehearsed on a small stand-in, without a forward of the model.

A rule turns projected gradients into steps in its own way (momentum, normalisation, warm-up, sign, comparison of
losses). What that comes to over a run is not derived rule by rule, it is tried: the rule itself, with the run's
directions, queries, estimator, blocks and ε, takes the run's steps on a few thousand weights whose loss

    f(x) = a·(x − x₀) + ½ h ‖x − x₀‖²        a fresh in every step: as noisy as batches can be

gives projected gradients as large as the model's and the model's curvature along a direction. The result is the
distance gone, in units of the perturbation: σ_T says that the run moves the weights like a perturbation with ε = σ_T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.model.zo_model import ZOModel
from zowrap.step.options import values_of

SIDE = 32  # of the square matrices that stand for the weights, one per block: 1024 weights average out to 3 %
STEPS = 200  # more are scaled up as the square root: from here on a run is a random walk


class StandIn(nn.Module):
    """One matrix per block; far enough from 0 for rules that look at the weights themselves.

    Attributes:
        start: x₀, float32 ``[blocks · SIDE²]``.
    """

    start: Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.block = nn.ParameterList(torch.randn(SIDE, SIDE, generator=generator) for _ in range(blocks))
        self.register_buffer("start", self.flat().detach().clone())

    def flat(self) -> Tensor:
        return torch.cat([matrix.reshape(-1) for matrix in self.block])


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """float32 ``[rows]`` losses; ``batch``: ``slope`` ``[rows, blocks · SIDE²]`` is a, ``curvature`` 0-d is h."""
    assert isinstance(model, StandIn)
    moved = model.flat() - model.start
    return batch["slope"] @ moved + batch["curvature"] / 2 * moved.square().sum()


class Rehearsal:
    """A rule and its options on the stand-in.

    Args:
        zm: the wrapped model whose rule and options are rehearsed.
        projected_grad: root mean square of the projected gradients.
        curvature: zᵀHz along a direction.
        rows: examples of a batch, where each has its own direction.
    """

    def __init__(self, zm: ZOModel, projected_grad: float, curvature: float, rows: int = 1) -> None:
        self.zm = zm
        self.rows = rows
        self._generator = torch.Generator().manual_seed(1)
        probe, model = self._wrapped(1.0)
        self.norm = self._direction_norm(probe, model)
        # ‖a‖ such that a·z is as large as asked on average.
        self.slope = projected_grad / self.norm
        self.curvature = curvature / self.norm**2

    def distance(self, lr: float, steps: int, schedule: Callable[[int], float]) -> float:
        """σ_T after ``steps`` steps at ``lr``, the rate of step t being ``lr · schedule(t)``."""
        zm, model = self._wrapped(lr)
        tried = min(steps, STEPS * len(model.block))
        for t in range(tried):
            zm.lr = lr * schedule(t * steps // tried)
            zm.step(**self._batch(model))
        moved = (model.flat() - model.start).detach().double().norm().item()
        return moved / (self.norm * math.sqrt(len(model.block))) * math.sqrt(steps / tried)

    def _wrapped(self, lr: float) -> tuple[ZOModel, StandIn]:
        """A fresh stand-in under a fresh state of the rule."""
        from zowrap.wrap import zo_wrap

        zm, count = self.zm, len(self.zm.job.blocks)
        options = replace(
            zm.options,
            lr=lr,
            eps=zm.eps,
            seed=zm.seed,
            blocks=[f"block.{i}" for i in range(count)] if count > 1 else None,
            memory=zm.schedule.name,
            engine="eager",
            # what only the model's own weights have
            trainable=None,
            weight_decay=0.0,
            quantized=None,
            masters=False,
            along="drawn",
        )
        model = StandIn(count)
        wrapped = zo_wrap(model, loss_fn=loss_of, **values_of(options))
        return wrapped, model

    def _batch(self, model: StandIn) -> dict[str, Any]:
        size = model.start.numel()
        slope = torch.randn(self.rows, size, generator=self._generator) * self.slope
        return {"slope": slope, "curvature": torch.tensor(self.curvature)}

    def _direction_norm(self, zm: ZOModel, model: StandIn) -> float:
        """‖z‖ of a direction (of one block), from the loss ½‖x − x₀‖² along it."""
        zm.accumulate(slope=torch.zeros(self.rows, model.start.numel()), curvature=torch.tensor(1.0))
        losses, _ = zm.peek()
        zm.discard()
        away = torch.tensor([point.coefficient for point in zm.points])
        rises = losses.reshape(len(away), -1).mean(1)[away != 0] / away[away != 0].square()
        return math.sqrt(2 * float(rises.mean())) / zm.eps
