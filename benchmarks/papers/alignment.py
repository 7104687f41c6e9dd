"""Compare runs with the true gradient, computed by backpropagation: its direction, and what v has learned of it.

Gradients are only looked at, never trained on: ∇f is the gradient of the mean loss on fixed reference rows, at the
weights before the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers.finetune import Cell, Workbench
from zowrap import ZOModel
from zowrap.step import blocks

Batch = dict[str, Tensor]
Tensors = Sequence[Tensor]


def reference_batch(bench: Workbench, rows: int) -> Batch:
    """The batch for ∇f: the first ``rows`` training rows in the order of seed 0."""
    return next(bench.stream(rows, 0))


def compute_gradient(zm: ZOModel, batch: Batch) -> list[Tensor]:
    """Compute ∇f at the current weights, float32, in the order of ``zm.parameters``."""
    moving = [parameter.tensor.detach().clone().requires_grad_() for parameter in zm.parameters]
    named = {f"model.{n}": t for p, t in zip(zm.parameters, moving, strict=True) for n in p.names}
    with torch.enable_grad():
        sums, weights = torch.func.functional_call(zm.loss_module, named, (batch,), tie_weights=True)
        loss = sums.sum() / weights.sum()
    return list(torch.autograd.grad(loss, moving))


def copy_slot(zm: ZOModel, name: str) -> list[Tensor]:
    """Copy a slot of the rule's state, in the order of ``zm.parameters``."""
    state = zm.state_dict()
    return [state[f"slots/{name}/{parameter.name}"] for parameter in zm.parameters]


def inner_product(a: Tensors, b: Tensors) -> float:
    """Inner product over all tensors, summed in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def cosine(a: Tensors, b: Tensors) -> float:
    return inner_product(a, b) / math.sqrt(inner_product(a, a) * inner_product(b, b))


def iterate_steps(bench: Workbench, cell: Cell) -> Iterator[tuple[int, ZOModel, Any]]:
    """Run a cell, and yield after each step (its number from 1, the model, a function that makes the next step)."""
    zm = bench.reset(cell)
    stream = bench.stream(cell.batch_size, cell.seed)
    for step in range(1, cell.steps + 1):
        yield step, zm, lambda: zm.step(**next(stream))


def measure_momentum(bench: Workbench, cell: Cell, beta: float, every: int, rows: int) -> list[dict[str, float]]:
    """cos(m, ∇f) and cos(g z, ∇f) at every ``every``-th step of a rule with m ← βm + (1−β) g z.

    Both are of the same step: m is the one that has just received g z, and g z is recovered from m before and after.
    """
    batch, found = reference_batch(bench, rows), []
    for step, zm, advance in iterate_steps(bench, cell):
        if step % every:
            advance()
            continue
        truth, before = compute_gradient(zm, batch), copy_slot(zm, "m")
        advance()
        after = copy_slot(zm, "m")
        estimate = [new - beta * old for new, old in zip(after, before, strict=True)]
        found.append({"step": step, "m": cosine(after, truth), "gz": cosine(estimate, truth)})
    return found


def measure_second_moment(bench: Workbench, cell: Cell, beta: float, every: int, rows: int) -> list[dict[str, float]]:
    """Coefficient of variation of v over all coordinates, at every ``every``-th step of a rule with v ← βv + (1−β)ĝ².

    ``noise`` is the coefficient that v would have if all coordinates were alike: with ĝ = g z, z gaussian and one
    direction a step, v_j = Σ_s w_s g_s² z_sj² has mean Σ w g² and variance 2 Σ w² g⁴ over j. ``gradient`` is the
    coefficient of the squares of ∇f's elements, which v would have to show to adapt to them.
    """
    batch, found = reference_batch(bench, rows), []
    first = second = 0.0
    for step, zm, advance in iterate_steps(bench, cell):
        g = float(advance().projected_grad)
        first = beta * first + (1 - beta) * g**2
        second = beta**2 * second + (1 - beta) ** 2 * g**4
        if step % every == 0:
            v, truth = copy_slot(zm, "v"), compute_gradient(zm, batch)
            found.append(
                {
                    "step": step,
                    "v": coefficient_of_variation(v),
                    "noise": math.sqrt(2 * second) / first,
                    "gradient": coefficient_of_variation([t.square() for t in truth]),
                }
            )
    return found


def coefficient_of_variation(tensors: Tensors) -> float:
    """Standard deviation over mean of all elements, in float64."""
    count = sum(t.numel() for t in tensors)
    mean = sum(float(t.double().sum()) for t in tensors) / count
    square = sum(float(t.double().square().sum()) for t in tensors) / count
    return math.sqrt(max(square - mean**2, 0.0)) / mean


def measure_subspaces(zm: ZOModel, truth: Tensors, kept: Tensors | None, rank: int, seed: int = 0) -> dict[str, Any]:
    """Stable rank and effective overlap of the directions of one step, C = E[z zᵀ] given the step's subspace.

    Our reading of 2501.19099: stable rank tr C / ‖C‖, effective overlap ∇fᵀ C ∇f / (‖C‖ ‖∇f‖²), the share of the
    squared gradient that lies where the direction looks. Their quotient is the expected squared cosine of g z with ∇f,
    given to first order; ``gain`` is that against the full space, overlap · d / stable rank.

    Args:
        truth: ∇f.
        kept: of a sparse direction, which elements it moves.
        rank: r of a low-rank direction Z = U Vᵀ, U and V gaussian: C is I ⊗ V Vᵀ for each matrix.
    """
    d, energy = sum(t.numel() for t in truth), [float(t.double().square().sum()) for t in truth]
    square = sum(energy)
    found = {"full": [(float(d), 1.0)]}
    found["block"] = [
        (float(sum(truth[i].numel() for i in block.indices)), sum(energy[i] for i in block.indices) / square)
        for block in blocks.partition(zm.parameters, "layer")
    ]
    if kept is not None:
        masked = [t * keep for t, keep in zip(truth, kept, strict=True)]
        found["sparse"] = [(sum(float(keep.sum()) for keep in kept), inner_product(masked, masked) / square)]
    draw = torch.Generator().manual_seed(seed)
    factors = [torch.randn(t.shape[-1], rank, generator=draw) for t in truth]
    largest = max(float(torch.linalg.matrix_norm(v, 2)) ** 2 for v in factors)
    trace = sum(t.shape[0] * float(v.square().sum()) for t, v in zip(truth, factors, strict=True))
    seen = sum(float((t @ v).double().square().sum()) for t, v in zip(truth, factors, strict=True))
    found["lowrank"] = [(trace / largest, seen / largest / square)]
    return {name: _summary(pairs, d) for name, pairs in found.items()}


def _summary(pairs: Sequence[tuple[float, float]], d: int) -> dict[str, float]:
    """Means over a sweep of the blocks, and the range of the gain."""
    gains = [overlap * d / rank for rank, overlap in pairs]
    return {
        "stable_rank": sum(rank for rank, _ in pairs) / len(pairs),
        "overlap": sum(overlap for _, overlap in pairs) / len(pairs),
        "gain": sum(gains) / len(gains),
        "least_gain": min(gains),
        "most_gain": max(gains),
    }


def find_moved(bench: Workbench, cell: Cell) -> list[Tensor]:
    """Find the elements that the first step of a cell moves, as float32: the mask of a sparse direction."""
    zm = bench.reset(cell)
    before = [parameter.tensor.clone() for parameter in zm.parameters]
    zm.step(**next(bench.stream(cell.batch_size, cell.seed)))
    return [(p.tensor != old).float() for p, old in zip(zm.parameters, before, strict=True)]
