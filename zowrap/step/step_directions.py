"""The directions of one step: which block, under which keys, with what numbers.

Everything here is a pure function of (seed, step, direction) and of the rule's state as the step finds it; it is
computed once per step, whatever the number of micro-batches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.numerics import noise
from zowrap.rules.estimators import Point
from zowrap.step.arithmetic import sum_slots
from zowrap.step.job import DirectionNoise, Engine, Job


class StepDirections:
    """The directions of one step.

    Args:
        ids: int64 ``[parameters]``.
        step: a number, or 0-d int64 on the device while the step is recorded.
        block: the active block.
    """

    def __init__(self, job: Job, engine: Engine, ids: Tensor, seed: int, step: int | Tensor, block: int) -> None:
        self.job, self.engine, self.ids, self.seed, self.step, self.block = job, engine, ids, seed, step, block
        self._refreshed: list[tuple[Tensor, Tensor]] = []  # state that the step renewed, and its value before

    @functools.cached_property
    @torch.no_grad()
    def queries(self) -> list[DirectionNoise]:
        """One direction for each query."""
        if self.job.direction.lowrank is None:
            return [self._full_rank(query) for query in range(self.job.queries)]
        index = torch.arange(self.job.queries, device=self.job.device)
        return [self.lowrank(index[q : q + 1], per_example=False) for q in range(self.job.queries)]

    def population(self, examples: range) -> DirectionNoise:
        """The directions of some of the step's examples, by their index in the whole batch of the step."""
        index = torch.arange(examples.start, examples.stop, device=self.job.device)
        return self.lowrank(index, per_example=True)

    def keep(self, apply: Tensor) -> None:
        """The step ends: what it renewed stays, unless it was skipped (``apply``, 0-d bool, is False)."""
        for slot, before in self._refreshed:
            slot.copy_(torch.where(apply, slot, before))
        self._refreshed = []

    def undo(self) -> None:
        """The step is given up: put back the state that it renewed."""
        for slot, before in self._refreshed:
            slot.copy_(before)
        self._refreshed = []

    def _full_rank(self, query: int) -> DirectionNoise:
        job, block = self.job, self.block
        keys = noise.derive_keys(self.seed, self.step, query, self.ids, noise.TAG_DIRECTION)
        scale = torch.ones((), device=job.device)
        if job.direction.scale is not None:
            scale = job.direction.scale(self.engine.squared_norm(block, keys), job.count(block))
        return DirectionNoise(block, keys, scale, self.scalars)

    @torch.no_grad()
    def lowrank(self, index: Tensor, per_example: bool) -> DirectionNoise:
        """Low-rank directions: ``index`` int64 ``[directions]``, queries or examples."""
        job, block, law = self.job, self.block, self.job.direction.lowrank
        assert law is not None

        def right_keys(step: int | Tensor, which: Tensor) -> Tensor:
            return noise.derive_keys(self.seed, step, which, self.ids, noise.TAG_RIGHT)

        index = index.unsqueeze(1)
        keys = noise.derive_keys(self.seed, self.step, index, self.ids, noise.TAG_DIRECTION)
        now = right_keys(self.step, index) if law.nu is None else right_keys(self.step // law.nu, 0 * index)
        one = torch.ones((), device=job.device)
        query = DirectionNoise(block, keys, one, self.scalars, self.engine.factors(block, keys, now), per_example)
        if job.rule.left is not None:
            assert law.nu is not None
            epoch = job.states[block]["epoch"]
            old = right_keys(epoch.to(torch.int64), 0 * index[:1])
            query.old_factors = self.engine.factors(block, keys[:1], old)
            query.moved = epoch != self.step // law.nu
        return query

    @functools.cached_property
    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """The numbers that the rule's direction needs beside noise: renewed ones, and sums over the block's state."""
        job = self.job
        if job.rule.refresh is not None and self.step:
            assert isinstance(self.step, int)  # such a step is not recorded
            for i, parameter in enumerate(job.parameters):
                for name, value in (job.rule.refresh(parameter.tensor, self.step) or {}).items():
                    self._refreshed.append((job.slots[name][i], job.slots[name][i].clone()))
                    job.slots[name][i].copy_(value)
        if job.rule.direction_scalars is None:
            return {}
        sums: dict[str, Tensor] = {}
        if job.rule.reduce is not None:
            for i in job.blocks[self.block].indices:
                for name, total in sum_slots(job.rule.reduce, job.slots_of(i)).items():
                    sums[name] = sums[name] + total if name in sums else total
        sums["count"] = torch.full((), float(job.count(self.block)), dtype=torch.float64, device=job.device)
        return job.rule.direction_scalars(job.states[self.block], sums, job.hyper)


def groups(points: Sequence[Point], device: torch.device, sequential: bool) -> list[tuple[int | None, Tensor]]:
    """Neighbouring points of one direction are evaluated together: (direction or None for θ itself, their signs).

    ``sequential`` evaluates each point by itself.
    """
    if sequential:
        return [group for point in points for group in groups([point], device, False)]
    found = itertools.groupby(points, key=lambda p: p.direction if p.coefficient else None)
    return [(direction, torch.tensor([p.coefficient for p in group], device=device)) for direction, group in found]
