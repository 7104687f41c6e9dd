"""Simulate how far a rule moves the weights in a run, on a small surrogate and without any forward of the model.

Each rule turns projected gradients into steps in its own way (momentum, normalisation, warm-up, sign, comparison of
losses). Instead of deriving the effect over a run for each rule, we run it: the rule itself, with the run's directions,
queries, estimator, blocks and ε, takes the run's steps on a few thousand weights with the loss

    f(x) = a·(x − x₀) + ½ h ‖x − x₀‖²        with a new random a in every step: as noisy as batches can be

whose projected gradients and curvature along a direction are as large as the model's. The result is the distance moved,
in units of the perturbation: with σ_T, the run moves the weights as far as a perturbation with ε = σ_T does.
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

SIDE = 32  # of the square matrices that replace the weights, one per block: with 1024 weights averages vary by 3 %
STEPS = 200  # longer runs are extrapolated by the square root, because beyond this a run is a random walk


class Surrogate(nn.Module):
    """A model with one matrix per block; its weights are not near 0, for rules that read the weights themselves.

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
        """All weights, float32 ``[blocks · SIDE²]``."""
        return torch.cat([matrix.reshape(-1) for matrix in self.block])


def surrogate_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The losses, float32 ``[rows]``. In ``batch``, ``slope`` ``[rows, blocks · SIDE²]`` is a, ``curvature`` is h."""
    assert isinstance(model, Surrogate)
    moved = model.flat() - model.start
    return batch["slope"] @ moved + batch["curvature"] / 2 * moved.square().sum()


class Simulation:
    """Runs a rule with its options on the surrogate.

    Args:
        zm: the wrapped model whose rule and options are simulated.
        projected_grad: root mean square of the projected gradients.
        curvature: zᵀHz along a direction.
        rows: examples of a batch if each has its own direction, else 1.
    """

    def __init__(self, zm: ZOModel, projected_grad: float, curvature: float, rows: int = 1) -> None:
        self.zm = zm
        self.rows = rows
        self._generator = torch.Generator().manual_seed(1)
        probe, model = self._wrap_surrogate(1.0)
        self.norm = self._direction_norm(probe, model)
        # With this ‖a‖, a·z has the given root mean square.
        self.slope = projected_grad / self.norm
        self.curvature = curvature / self.norm**2

    def distance(self, lr: float, steps: int, schedule: Callable[[int], float]) -> float:
        """Simulate ``steps`` steps, with the rate ``lr · schedule(t)`` at step t, and return σ_T."""
        zm, model = self._wrap_surrogate(lr)
        tried = min(steps, STEPS * len(model.block))
        for t in range(tried):
            zm.lr = lr * schedule(t * steps // tried)
            zm.step(**self._batch(model))
        moved = (model.flat() - model.start).detach().double().norm().item()
        return moved / (self.norm * math.sqrt(len(model.block))) * math.sqrt(steps / tried)

    def _wrap_surrogate(self, lr: float) -> tuple[ZOModel, Surrogate]:
        """Wrap a new surrogate with a new state of the rule."""
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
        model = Surrogate(count)
        wrapped = zo_wrap(model, loss_fn=surrogate_loss, **values_of(options))
        return wrapped, model

    def _batch(self, model: Surrogate) -> dict[str, Any]:
        size = model.start.numel()
        slope = torch.randn(self.rows, size, generator=self._generator) * self.slope
        return {"slope": slope, "curvature": torch.tensor(self.curvature)}

    def _direction_norm(self, zm: ZOModel, model: Surrogate) -> float:
        """Measure ‖z‖ of a direction (of one block) from the loss ½‖x − x₀‖² along it."""
        zm.accumulate(slope=torch.zeros(self.rows, model.start.numel()), curvature=torch.tensor(1.0))
        losses, _ = zm.peek()
        zm.discard()
        away = torch.tensor([point.coefficient for point in zm.points])
        rises = losses.reshape(len(away), -1).mean(1)[away != 0] / away[away != 0].square()
        return math.sqrt(2 * float(rises.mean())) / zm.eps
