"""The inputs of a step, checked and brought to the device: its batch, or the losses that ``update`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zowrap.errors import ZOError
from zowrap.loss.nested import flatten_batch, is_joined
from zowrap.step.job import Job


def name_batch(batches: tuple[Any, ...], batch: dict[str, Any]) -> dict[str, Any]:
    """The batch by name: ``step(**batch)`` and ``step(batch)`` are the same, the latter for any mapping."""
    if not batches:
        return batch
    if len(batches) > 1 or not isinstance(batches[0], Mapping):
        raise ZOError("a batch is given by name, step(input_ids=..., labels=...), or as one dictionary, step(batch)")
    return {**batches[0], **batch}


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the device, flat (:mod:`zowrap.loss.nested`) and contiguous, because compiled code relies on the
    strides; values that are None left out.

    Raises:
        ZOError: there is no tensor in it, or no row.
    """
    inputs = {}
    for name, value in flatten_batch(batch).items():
        if isinstance(value, Tensor):
            inputs[name] = value.to(device, non_blocking=True).contiguous()
        elif value is not None:
            inputs[name] = value
    tensors = [value for name, value in inputs.items() if isinstance(value, Tensor) and not is_joined(name)]
    if not tensors:
        raise ZOError("a step needs a batch of tensors, for example step(input_ids=..., labels=...)")
    if any(tensor.ndim and tensor.shape[0] == 0 for tensor in tensors):
        raise ZOError("this batch has no rows")
    return inputs


def check_losses(job: Job, losses: Any, projected_grad: Any) -> tuple[Tensor, Tensor | None]:
    """The losses and projected gradients that a step is given, as float32 tensors of the shapes that it has.

    Args:
        losses: ``[points + candidates]``, ``[points, batch]`` for a population; None where ``projected_grad`` is all.
        projected_grad: ``[directions]``, or None to estimate it from the losses.

    Raises:
        ZOError: neither is given, or one has another shape.
    """
    device, per_example, points = job.device, job.estimator.per_example, len(job.points)
    if projected_grad is not None:
        projected_grad = torch.as_tensor(projected_grad, dtype=torch.float32, device=device).reshape(-1)
    if losses is None:
        if projected_grad is None:
            raise ZOError("update() has nothing to apply: call accumulate(**batch) first")
        if job.rule.candidates is not None:
            raise ZOError(f"{job.rule.name} compares losses: give update() the losses of its candidates too")
        losses = torch.zeros((points, projected_grad.numel()) if per_example else (points,), device=device)
    elif projected_grad is None and job.estimator.exact:
        raise ZOError(f"losses alone do not give {job.estimator.name!r} its slopes: give projected_grad too")
    losses = torch.as_tensor(losses, dtype=torch.float32, device=device)
    if per_example:
        if losses.ndim != 2 or losses.shape[0] != points or not losses.shape[1]:
            raise ZOError(f"a population's losses are [{points}, batch], got shape {tuple(losses.shape)}")
    elif losses.shape != (points + job.candidates,):
        count = points + job.candidates
        raise ZOError(f"this step has {count} evaluations, got losses of shape {tuple(losses.shape)}")
    directions = losses.shape[1] if per_example else job.queries
    if projected_grad is not None and projected_grad.shape != (directions,):
        kind = "examples" if per_example else "queries"
        raise ZOError(f"this step has {directions} {kind}, got {projected_grad.numel()} projected gradients")
    return losses, projected_grad


def check_weights(job: Job, losses: Tensor, weights: Any) -> Tensor | None:
    """Each example's share of a population, float32 ``[batch]``; None where the directions of a step count the same.

    Raises:
        ZOError: the step is no population, or has another number of examples.
    """
    if not job.estimator.per_example:
        if weights is not None:
            raise ZOError(f"weights are the examples' shares of a population, not of {job.estimator.name!r}")
        return None
    examples = losses.shape[1]
    if weights is None:
        return torch.full((examples,), 1 / examples, device=losses.device)
    weights = torch.as_tensor(weights, dtype=torch.float32, device=losses.device)
    if weights.shape != (examples,):
        raise ZOError(f"this population has {examples} examples, got weights of shape {tuple(weights.shape)}")
    return weights
