"""The eager engine: the oracle. Plain torch, one tensor at a time, simple enough to trust by reading.

It materialises a perturbed copy of the tunable parameters for each evaluation (the weights themselves are only
written by :meth:`EagerEngine.update`), so it needs one more copy of what moves and is slower; it runs any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap import noise
from zowrap.directions import integer_squares, squared_norm
from zowrap.engines.base import DirectionStream, Job
from zowrap.loss import Batch
from zowrap.modes import evaluation_mode
from zowrap.parameters import Parameter
from zowrap.step import Conclusion, conclude, perturbed, update_leaf


class EagerEngine:
    """See the module. ``project`` maps losses and ε to projected gradients."""

    name = "eager"

    def __init__(self, job: Job, project: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.job = job
        self.project = project

    def active(self, block: int) -> list[tuple[int, Parameter]]:
        """(index, parameter) of the block's parameters."""
        return [(i, self.job.parameters[i]) for i in self.job.blocks[block].indices]

    def direction(self, stream: DirectionStream, index: int) -> Tensor:
        """z of parameter ``index``: float32, the parameter's shape."""
        job = self.job
        u = noise.draw(job.direction.law, stream.keys[index], job.parameters[index].tensor.shape)
        if job.direction.needs_norm:
            u = u * stream.scale
        return job.rule.direction(u, job.direction_slots_of(index), stream.scalars)

    @torch.no_grad()
    def losses(self, batch: Batch, stream: DirectionStream | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        with evaluation_mode(self.job.loss):
            if stream is None:
                sums, weights = self.job.loss(batch)
                return sums.unsqueeze(0), weights
            rows = []
            generator = torch.get_rng_state()
            for coefficient in coefficients:
                torch.set_rng_state(generator)  # a model that draws random numbers draws the same ones at every point
                copies = {}
                for i, p in self.active(stream.block):
                    copy = perturbed(p.tensor, self.direction(stream, i), coefficient)
                    copies.update({f"model.{name}": copy for name in p.names})
                sums, weights = torch.func.functional_call(self.job.loss, copies, (batch,), tie_weights=True)
                rows.append(sums)
            return torch.stack(rows), weights

    @torch.no_grad()
    def squared_norm(self, block: int, keys: Tensor) -> Tensor:
        law = self.job.direction.law
        total = torch.zeros((), dtype=torch.int64, device=keys.device)
        for i, parameter in self.active(block):
            total += integer_squares(noise.draw(law, keys[i], parameter.tensor.shape)).sum()
        return squared_norm(total)

    @torch.no_grad()
    def conclude(self, block: int, losses: Tensor, step: int, projected_grad: Tensor | None) -> Conclusion:
        job = self.job
        done = torch.tensor(float(step), device=losses.device)
        return conclude(job.rule, self.project, job.states[block], losses, job.hyper, done, projected_grad)

    @torch.no_grad()
    def update(self, streams: Sequence[DirectionStream], rounding_keys: Tensor, conclusion: Conclusion) -> None:
        job, block = self.job, streams[0].block
        for i, parameter in self.active(block):
            w = parameter.tensor
            slots = job.slots_of(i)
            bits = None
            if w.dtype in (torch.bfloat16, torch.float16):
                index = torch.arange(w.numel(), dtype=torch.int64, device=w.device)
                bits = noise.hash_bits(*noise.split_index(index), rounding_keys[i]).reshape(w.shape)
            new_w, new_slots = update_leaf(
                job.rule,
                w,
                [self.direction(stream, i) for stream in streams],
                slots,
                conclusion.coefficients,
                job.hyper,
                conclusion.apply,
                bits,
                job.decays and parameter.decays,
            )
            w.copy_(new_w)
            for name, value in new_slots.items():
                slots[name].copy_(value)
        for name, value in conclusion.state.items():
            job.states[block][name].copy_(value)

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "program_hash": None, "compile_count": 0}
