"""Compute the costs of a step from shapes alone: operations, bytes, random numbers and peak memory.

Nothing is executed and no weight is read, so the model may be on the ``meta`` device, and models that do not fit into
memory can be analysed. The programs are those of the compiled engine. Their memory is tracked from region to region
(:mod:`zowrap.compiler.regions`), and inside each region by :mod:`zowrap.analysis.region`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from zowrap.analysis.operators import Work, merged
from zowrap.analysis.program import ProgramCost, ProgramCosts
from zowrap.custom_op import Operator
from zowrap.engines.compiled import CompiledEngine
from zowrap.errors import ZOCaptureError
from zowrap.loss.module import Batch, count_rows
from zowrap.machine import MARGIN
from zowrap.ops.scratch import MOST_ELEMENTS
from zowrap.passes.epilogue import update_operator
from zowrap.step.job import Engine, Job
from zowrap.step.lowrank import matrix_shape
from zowrap.step.parameters import weight_bytes
from zowrap.step.step_directions import groups

SAMPLED_BLOCKS = 5  # with more blocks, only this many are analysed and the others interpolated


@dataclass(frozen=True)
class Memory:
    """Memory of a step, in bytes.

    Attributes:
        weights: parameters and buffers, each storage counted once.
        state: state of the rule.
        scratch: buffers that operators keep from step to step.
        transient: peak of the memory that a step allocates and frees, such as activations.
    """

    weights: int
    state: int
    scratch: int
    transient: int

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.scratch + self.transient


@dataclass(frozen=True)
class Costs:
    """The costs of one step on one batch.

    Attributes:
        sizes: sizes of the batch's tensors, by name.
        step: work of the whole step, including the update; the mean over all blocks.
        forwards: work of two plain forwards of the same batch.
        memory: memory under the schedule in use, for the block that needs most.
        schedules: peak bytes under ``"paired"`` and ``"sequential"``.
        forward_transient: peak bytes that one plain forward allocates and frees.
    """

    sizes: dict[str, tuple[int, ...]]
    step: Work
    forwards: Work
    memory: Memory
    schedules: dict[str, int]
    forward_transient: int

    def as_dict(self) -> dict[str, Any]:
        """Return the costs as a dictionary for JSON.

        ``{"batch": {name: [sizes]}, "step": work, "two_forwards": work, "flops_ratio", "bytes_ratio", "memory":
        {"weights", "state", "scratch", "transient", "peak", "forward_transient", "paired", "sequential"}}``, where
        ``work`` is ``{"flops", "bytes", "weight_bytes", "activation_bytes", "update_bytes", "noise"}``. Numbers other
        than ratios are integers, and memory is in bytes. ``noise`` counts random numbers; ``paired`` and
        ``sequential`` are peaks.
        """
        return {
            "batch": {name: list(shape) for name, shape in self.sizes.items()},
            "step": _record(self.step),
            "two_forwards": _record(self.forwards),
            "flops_ratio": round(self.step.flops / max(self.forwards.flops, 1), 4),
            "bytes_ratio": round(self.step.bytes / max(self.forwards.bytes, 1), 4),
            "memory": {
                **vars(self.memory),
                "peak": self.memory.peak,
                "forward_transient": self.forward_transient,
                **self.schedules,
            },
        }


def _record(work: Work) -> dict[str, int]:
    return {"flops": round(work.flops), "bytes": round(work.bytes)} | {
        name: round(value) for name, value in vars(work).items() if name != "flops"
    }


class Order(Protocol):
    """The order in which a step evaluates its points, see :mod:`zowrap.model.schedule`."""

    @property
    def sequential(self) -> bool:
        """Whether points are evaluated one at a time instead of both sides of a direction together."""
        ...


class CostModel:
    """The costs of a wrapped model's step on batches of given sizes.

    Args:
        job, engine, schedule: those of a model that uses the compiled engine, on any device.
        batch: tensors of the given sizes, on the ``meta`` or any other device; their values are not read.

    Raises:
        ZOCaptureError: the model cannot be captured, or its sizes depend on its data.
    """

    def __init__(self, job: Job, engine: Engine, schedule: Order, batch: Batch) -> None:
        if not isinstance(engine, CompiledEngine):
            raise ZOCaptureError("costs are only computed for the compiled engine, but this model runs eagerly")
        if engine.fallen_back is not None:
            raise ZOCaptureError(f"this model runs eagerly, because {engine.fallen_back}")
        self.job, self.engine, self.schedule, self.batch = job, engine, schedule, batch
        self.per_example = job.estimator.per_example
        self._programs = ProgramCosts(batch, engine.min_layers, engine.shares)
        self._found: dict[tuple[int, int | str], ProgramCost] = {}

    # --- the step ---------------------------------------------------------------------------------------------

    def costs(self, sequential: bool | None = None) -> Costs:
        """Compute the costs under a schedule, by default the model's own."""
        job = self.job
        sequential = self.schedule.sequential if sequential is None else sequential
        plain, blocks = self.program_cost(-1, 0), _sample(len(job.blocks))
        steps = [self._step(block, sequential) for block in blocks]
        weights, transient = weight_bytes(job.loss.model), max(t for _, t in steps)
        memory = Memory(weights, job.state_bytes, self._scratch(sequential), transient)
        transient = max(self._step(block, not sequential)[1] for block in blocks)
        other = replace(memory, scratch=self._scratch(not sequential), transient=transient)
        paired, alone = (other, memory) if sequential else (memory, other)
        return Costs(
            {name: tuple(value.shape) for name, value in self.batch.items() if isinstance(value, Tensor)},
            _mean([work for work, _ in steps], blocks, len(job.blocks)),
            plain.work * 2,
            memory,
            {"paired": paired.peak, "sequential": alone.peak},
            plain.transient,
        )

    def bound(self) -> int:
        """Return an upper bound on the peak bytes of a paired step, quickly: it takes milliseconds.

        The bound assumes that nothing is ever freed. Each value of the captured program is counted once for each of the
        points that are evaluated together. This includes weights, because uses without an operator of ours need a
        perturbed copy.
        """
        # With residual credit, the derivative of what follows the stream has at most as many values again.
        credit = self.job.estimator.credit
        counts = {2} if credit else {max(points, 1) for points in map(int, self.evaluations(False))}
        values = max(counts) * self._programs.bytes_of_all_values(self.engine.captured(self.batch))
        update = max(self._factors(block) + self._update(block)[1] for block in _sample(len(self.job.blocks)))
        # One set of perturbed chunks for each number of points, and one chunk each of logits and of a gradient.
        widest = max(parameter.tensor.element_size() for parameter in self.job.parameters)
        scratch = (sum(counts) + max(counts) + 1) * MOST_ELEMENTS * max(widest, 4)
        return weight_bytes(self.job.loss.model) + self.job.state_bytes + values + update + scratch

    def _scratch(self, sequential: bool) -> int:
        """Return the bytes of the buffers that the operators of a step keep for the next step."""
        buffers = [cost.buffers for _, cost in self.programs(sequential)]
        for i in range(len(self.job.parameters)):
            update = update_operator(self.job, i)
            buffers.append(update.buffers(self._update_arguments(update, i)))
        return sum(merged(buffers).values())

    def programs(self, sequential: bool | None = None) -> list[tuple[str, ProgramCost]]:
        """Return ``(name, cost)`` for each program of a step under a schedule, for a sample of the blocks."""
        sequential = self.schedule.sequential if sequential is None else sequential
        found: dict[str, ProgramCost] = {}
        for block in _sample(len(self.job.blocks)):
            for points in self.evaluations(sequential):
                name = f"{points} points, block {self.job.blocks[block].name}" if points else "loss"
                if isinstance(points, str):
                    name = f"residual credit, {points}"
                found.setdefault(name, self.program_cost(block if points else -1, points))
        return list(found.items())

    def evaluations(self, sequential: bool) -> list[int | str]:
        """Return the number of points in each evaluation of a step, 0 for θ itself; or the parts of residual credit."""
        if self.job.estimator.credit:
            return ["without inputs", "inputs"] if sequential else ["all"]
        grouped = groups(self.job.points, self.job.device, sequential)
        counts: list[int | str] = [0 if direction is None else signs.shape[0] for direction, signs in grouped]
        candidates = self.job.candidates
        return counts + ([1] * candidates if sequential else [candidates] * (candidates > 0))

    def _step(self, block: int, sequential: bool) -> tuple[Work, int]:
        """Return the work of a step that moves the block, and its peak transient bytes."""
        work, transient = Work(), 0
        if self.job.estimator.credit:
            return self._credit_step(sequential)
        for points in self.evaluations(sequential):
            cost = self.program_cost(block if points else -1, points)
            work, transient = work + cost.work, max(transient, cost.transient)
        update, temporary = self._update(block)
        factors = self._factors(block)
        return work + update, factors + max(transient, temporary)

    def _credit_step(self, sequential: bool) -> tuple[Work, int]:
        """Return the work of a step with residual credit, and its peak transient bytes."""
        work, transient, held = Work(), 0, 0
        for part in self.evaluations(sequential):
            cost = self.program_cost(0, part)
            work, transient, held = work + cost.work, max(transient, held + cost.transient), held + cost.held
        program = self.program_cost(0, "all").program
        outputs: Any = program.graph.output_node().args[0]
        largest = 0
        for use in program.credit:
            w, update = self.job.parameters[use.parameter].tensor, update_operator(self.job, use.parameter)
            arguments = self._update_arguments(update, use.parameter)
            tokens = 1
            if use.matrix:
                tokens = math.prod(self._programs.sizes(program, outputs[use.outputs[0]])[:-1])
                arguments["left"] = torch.empty(w.shape[0], tokens, device="meta")
            work.update_bytes += 2 * sum(map(_size, (w, *self.job.slots_of(use.parameter).values())))
            work.flops += update.flops(arguments)
            largest = max(largest, 4 * tokens * sum(w.shape))
        return work, max(transient, held + largest)

    def _update(self, block: int) -> tuple[Work, int]:
        """Return the work and peak bytes of the epilogue: each active weight and its state is read and written once."""
        job, work, pair = self.job, Work(), 0
        directions = self._directions()
        for i in job.blocks[block].indices:
            w, update = job.parameters[i].tensor, update_operator(job, i)
            arguments = self._update_arguments(update, i)
            work.update_bytes += 2 * sum(map(_size, (w, *job.slots_of(i).values())))
            work.noise += update.noise(arguments)
            work.flops += update.flops(arguments)
            if job.layouts:
                place = job.layouts[block].places[i]
                pair = max(pair, 4 * directions * place.rank * (place.rows + (place.columns if place.right else 0)))
        if not job.layouts:
            return work, 0
        work.noise += directions * job.layouts[block].size
        return work, self._factors(block) + pair  # the epilogue concatenates a copy of all directions' factors

    def _update_arguments(self, update: Operator, index: int) -> dict[str, Any]:
        """Return the arguments on which the cost of a parameter's update depends."""
        job, w = self.job, self.job.parameters[index].tensor
        keys = [None] * job.queries
        arguments: dict[str, Any] = {str(update.traits.writes): w, "keys": keys, "kernel_key": self.engine.kernels.key}
        if (law := job.direction.lowrank) is not None:
            rows, _, rank = matrix_shape(w, law.rank)
            arguments["left"] = torch.empty(rows, rank * self._directions(), device="meta")
        return arguments

    def _directions(self) -> int:
        """Return the number of directions of a step."""
        return count_rows(self.batch) if self.per_example else self.job.queries

    def _factors(self, block: int) -> int:
        """Return the bytes of the factors of low-rank directions, which are held for the whole step."""
        if not self.job.layouts:
            return 0
        directions = self._directions()
        return 4 * directions * self.job.layouts[block].size * (2 if self.job.rule.left is not None else 1)

    # --- one program ------------------------------------------------------------------------------------------

    def program_cost(self, block: int, points: int | str) -> ProgramCost:
        """Return the cost of a block's program for this number of points, or of a part of residual credit."""
        key = (block, points)
        if key not in self._found and isinstance(points, str):
            program = self.engine.credit_program(self.engine.captured(self.batch), points)
            self._found[key] = self._programs.cost(program, holds=points != "inputs")
        if key not in self._found:
            assert isinstance(points, int)
            program = self.engine.program(self.batch, block, points, self.per_example and points > 0)
            self._found[key] = self._programs.cost(program)
        return self._found[key]


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _sample(count: int) -> list[int]:
    """Return the indices of the blocks to analyse: all ``count``, or some at both ends and the middle one."""
    if count <= SAMPLED_BLOCKS:
        return list(range(count))
    return [0, 1, count // 2, count - 2, count - 1]


def _mean(values: Sequence[Work], blocks: Sequence[int], count: int) -> Work:
    """Return the mean over all blocks; between the analysed ``blocks``, ``values`` are interpolated linearly."""
    total = Work()
    for block in range(count):
        after = min(bisect.bisect_left(blocks, block), len(blocks) - 1)
        if blocks[after] == block:
            total += values[after]
            continue
        low, high = blocks[after - 1], blocks[after]
        share = (block - low) / (high - low)
        total += values[after - 1] * (1 - share) + values[after] * share
    return total * (1 / count)


def what_helps(costs: Costs | None, batch_size: int, itemsize: int) -> list[str]:
    """Return command-line options that reduce memory, limited to those that should save a tenth or more.

    Args:
        costs: costs under the schedule in use; None if they are not known.
        itemsize: bytes of one weight.
    """
    found = []
    if costs is not None:
        memory = costs.memory
        if costs.schedules["sequential"] < memory.peak * (1 - MARGIN):
            found.append("--memory sequential")
        if batch_size > 1 and memory.transient > MARGIN * memory.peak:
            found.append("a smaller --batch-size")
        if memory.state > MARGIN * memory.peak:
            found.append("a rule without state (zo_sgd), or fewer weights that move (--trainable, adapters)")
    if itemsize > 2:
        found.append("--dtype bfloat16")
    return found or ["a smaller model"]
