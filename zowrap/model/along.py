"""Losses along the credit of a step: what the checks of a run and the choice of its rate measure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap import rules
from zowrap.engines.eager import EagerEngine
from zowrap.model.wrapped import Wrapped
from zowrap.numerics import noise
from zowrap.step.arithmetic import Conclusion, conclude, update_leaf


def measure_first_step(zm: Wrapped) -> float:
    """Return the root mean square of the first step on the accumulated credit, for η = 1, as the rule makes it of
    gaussian elements.
    """
    job, (losses, g) = zm.job, zm.peek()
    one = torch.ones((), device=job.device)
    hyper = {**job.hyper, "lr": one}
    conclusion = conclude(job.rule, job.project, job.states[0], losses, hyper, torch.zeros_like(one), g)
    z = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(job.device)
    slots = {name: torch.zeros_like(z) for name in job.rule.element_slots(torch.float32)}
    moved, _ = update_leaf(
        job.rule, torch.zeros_like(z), [z], slots, conclusion.coefficients, hyper, one > 0, None, decay=False
    )
    return float(moved.square().mean().sqrt())


def losses_along(zm: Wrapped, batches: Sequence[dict[str, Any]], distances: Sequence[float]) -> list[float]:
    """Return the mean losses of ``batches`` at θ − distance · G/rms(G), G being the credit accumulated so far.

    The weights are moved for it, rounded as their updates are, and put back bit for bit from a copy on the host.
    """
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _moving(zm)]
    losses = []
    try:
        for distance in distances:
            if distance:
                _move(zm, distance)
            losses.append(_loss(zm, batches))
            for tensor, value in kept:
                tensor.data.copy_(value)
    finally:
        for tensor, value in kept:
            tensor.data.copy_(value)
    return losses


def count_moving(zm: Wrapped) -> int:
    """Return the number of elements that the credit accumulated so far moves."""
    return sum(tensor.numel() for tensor in _moving(zm))


def measure_gain(zm: Wrapped) -> float:
    """Return the mean gain of the matrices that the accumulated credit moves: the root mean square over their elements
    of ‖W‖/√(number of singular values), by ‖W‖ over √(rows · columns); infinite where only vectors move, and of
    matrices that are zero, as new adapters are.
    """
    matrices = [tensor.detach().float() for tensor in _moving(zm) if tensor.ndim >= 2 and bool(tensor.any())]
    if not matrices:
        return math.inf
    gains = sum(float(matrix.square().sum()) / min(matrix.shape[-2:]) for matrix in matrices)
    return math.sqrt(gains / sum(matrix.numel() for matrix in matrices))


def _moving(zm: Wrapped) -> list[Tensor]:
    return [zm.job.parameters[i].tensor for i in zm.accumulator.credit.parameters]


def _loss(zm: Wrapped, batches: Sequence[dict[str, Any]]) -> float:
    """The mean loss of the micro-batches of a step, each with its weight, by the program that gives credit: another
    one would have to be compiled, and would round in other places.
    """
    total = weight = 0.0
    for batch in batches:
        measured = zm.assign_credit(zm.prepare(batch))
        total, weight = total + float(measured.sums), weight + float(measured.weight)
    return total / weight if weight else 0.0


def _move(zm: Wrapped, distance: float) -> None:
    """Move the weights by −distance · G/rms(G), as plain gradient descent would."""
    job, accumulator = zm.job, zm.accumulator
    one = torch.ones(1, device=job.device)
    plain = EagerEngine(
        dataclasses.replace(
            job, rule=rules.get("zo_sgd"), slots={}, states=[{}], hyper={**job.hyper, "lr": one[0]}, decays=False
        )
    )
    _, g = zm.peek()
    assert accumulator.weight is not None
    factor = (distance / (g[0] * accumulator.weight)).float()
    rounding = noise.derive_keys(zm.seed, zm.step_count, 0, job.ids, noise.TAG_ROUNDING)
    move = Conclusion({}, {"g": one}, one[0] > 0, one, one[0])
    zm.engine.visit_credit(accumulator.credit, lambda i, pieces: plain.write_credit(i, pieces, factor, rounding, move))
