"""Compute the work and memory of one region of a program without running it.

The region's nodes are executed on fake tensors of the batch's sizes, which computes nothing but gives exact shapes,
dtypes and shared storages. Which values Inductor writes to memory is modelled:

    separate kernels   products, attention, convolutions and this library's operators read their inputs from memory and
                       write their results
    fused nodes        the value of any other node stays in registers, unless a separate kernel reads it, another region
                       reads it, or a node reads it that has to wait for a separate kernel
    reused memory      a fused kernel overwrites an input of the same size that nothing reads afterwards

A region's inputs stay alive while it runs, because the caller holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from zowrap.analysis.operators import (
    NO_COST,
    OperatorCost,
    Work,
    flop_formulas,
    is_called,
    looks_up,
    merged,
    operator_cost,
)
from zowrap.compiler.regions import Region
from zowrap.custom_op import PersistentBuffers


@dataclass
class Analysis:
    """The analysis of a region at given sizes.

    Attributes:
        outputs: fake values of the region's outputs, in order.
        owners: the memory of each output: ``("input", i)`` or ``("own", n)``.
        own: bytes of each piece of memory that the region allocates for its outputs.
        peak: peak bytes allocated by the region, including its outputs.
        work: computation and memory traffic of the region.
        buffers: buffers that its operators keep from step to step.
        flops: operations by position of the node, for nodes that have any.
        stored: positions of the nodes with values that are written to memory.
    """

    outputs: list[Any]
    owners: list[tuple[str, int] | None]
    own: dict[int, int]
    peak: int
    work: Work
    buffers: PersistentBuffers
    flops: dict[int, int] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)


@dataclass
class _Memory:
    """A piece of memory, the node that allocates it, and the nodes that read it (views do not count as readers)."""

    bytes: int
    made_by: int  # position of the node; -1 for an input
    level: int = 0
    readers: list[int] = field(default_factory=list)
    stored: bool = True


def analyse(region: Region, given: Sequence[Any], weights: Sequence[bool], mode: FakeTensorMode) -> Analysis:
    """Execute a region on fake tensors and track its memory.

    Args:
        given: fake values (or numbers) of the region's inputs at the given sizes, created under ``mode``.
        weights: whether each input is a parameter or a buffer.
    """
    run = _Run(region.nodes, region.inputs, given, mode)
    of_inputs = {m: i for i, n in reversed(list(enumerate(region.inputs))) for m in run.place.get(n, ())}
    held = [run.place[n][0] if n in run.place else None for n in region.outputs]
    owners = [None if m is None else ("input", of_inputs[m]) if m in of_inputs else ("own", m) for m in held]
    kept = {m for m in held if m is not None}
    run.decide(kept)
    fixed = {m for n, weight in zip(region.inputs, weights, strict=True) if weight for m in run.place.get(n, ())}
    peak, work = run.replay(kept, fixed)
    own = {m: run.memory[m].bytes for m in kept if m not in of_inputs}
    stored = {m.made_by for m in run.memory if m.stored and m.made_by >= 0}
    outputs = [run.values[n] for n in region.outputs]
    buffers = merged(cost.buffers for cost in run.costs.values())
    flops = {i: cost.flops for i, cost in run.costs.items() if cost.flops}
    return Analysis(outputs, owners, own, peak, work, buffers, flops, stored)


class _Run:
    """An execution of a region on fake tensors.

    Attributes:
        values: fake value of each node.
        memory: all pieces of memory.
        place: for each node, the indices of its memory.
        costs: costs of the nodes that are separate kernels, by position.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], given: Sequence[Any], mode: FakeTensorMode
    ) -> None:
        self.nodes = nodes
        self.values: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
        self.memory: list[_Memory] = []
        self.place: dict[fx.Node, tuple[int, ...]] = {}
        self.costs: dict[int, OperatorCost] = {}
        self.level: list[int] = []
        self.own_kernel: list[bool] = []
        self._known: dict[int, int] = {}  # identity of a storage → index of its memory
        for node in inputs:
            self._place(node, self.values[node], -1, 0)
        with torch.no_grad(), mode, FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            for i, node in enumerate(nodes):
                self._execute(i, node, counter)

    def _execute(self, i: int, node: fx.Node, counter: FlopCounterMode) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        so_far = counter.get_total_flops()
        value = self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        counted = counter.get_total_flops() - so_far
        before = [self.memory[m].made_by for n in node.all_input_nodes for m in self.place.get(n, ())]
        level = max((self.level[p] + self.own_kernel[p] for p in before if p >= 0), default=0)
        called = bool(counted) or is_called(node.target)
        self.level.append(level)
        self.own_kernel.append(called)
        if self._place(node, value, i, level) or called:
            for number in {m for n in node.all_input_nodes for m in self.place.get(n, ())}:
                self.memory[number].readers.append(i)
        if called:
            self.costs[i] = operator_cost(node, args, kwargs, value, counted)

    def _place(self, node: fx.Node, value: Any, made_by: int, level: int) -> bool:
        """Record the memory of a value or a list of values; return False if all are views of existing memory."""
        tensors = [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]
        new = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                new = True
                self._known[storage._cdata] = len(self.memory)
                self.memory.append(_Memory(storage.nbytes(), made_by, level))
        if tensors:
            self.place[node] = tuple(self._known[t.untyped_storage()._cdata] for t in tensors)
        return new or not tensors

    # --- values written to memory -----------------------------------------------------------------------------

    def decide(self, kept: set[int]) -> None:
        """Decide which values are stored; a value that is not is recomputed by its readers from stored ones."""
        for number, memory in enumerate(self.memory):
            if memory.made_by < 0 or self.own_kernel[memory.made_by]:
                continue
            called = any(self.own_kernel[r] for r in memory.readers)
            later = any(self.level[r] > memory.level for r in memory.readers)
            computed = any(n in self.place for n in self.nodes[memory.made_by].all_input_nodes)
            memory.stored = number in kept or called or (later and computed)

    def _bases(self, i: int) -> set[int]:
        """Return the indices of the stored memory that node ``i`` reads, directly or through nodes fused into it."""
        found: set[int] = set()
        todo, seen = [i], {i}
        while todo:
            for node in self.nodes[todo.pop()].all_input_nodes:
                for number in self.place.get(node, ()):
                    memory = self.memory[number]
                    if memory.stored:
                        found.add(number)
                    elif memory.made_by not in seen:
                        seen.add(memory.made_by)
                        todo.append(memory.made_by)
        return found

    def replay(self, kept: set[int], weights: set[int]) -> tuple[int, Work]:
        """Simulate the kernels' allocations, and return the peak bytes and the work."""
        kernels = [m.made_by for m in self.memory if m.stored and m.made_by >= 0]
        kernels = sorted({*kernels, *(i for i, own in enumerate(self.own_kernel) if own)})
        made: dict[int, list[int]] = {}
        for number, memory in enumerate(self.memory):
            if memory.stored and memory.made_by >= 0:
                made.setdefault(memory.made_by, []).append(number)
        bases = {i: self._bases(i) for i in kernels}
        last = {number: i for i in kernels for number in bases[i]}
        work, read = Work(), set()
        live = peak = 0
        for i in kernels:
            new = sum(self.memory[n].bytes for n in made.get(i, ()))
            dying = [n for n in bases[i] if last[n] == i and n not in kept and self.memory[n].made_by >= 0]
            freed = sum(self.memory[n].bytes for n in dying)
            cost = self.costs.get(i, NO_COST)
            over = not self.own_kernel[i] and any(self.memory[n].bytes == new for n in dying)
            peak = max(peak, live + cost.scratch + (0 if over else new))
            live += new - freed
            peak = max(peak, live)
            work.flops += cost.flops
            work.noise += cost.noise
            work.activation_bytes += new
            for number in bases[i]:
                # Fused kernels of one level usually form one loop, which reads each input once.
                group = (number, i if self.own_kernel[i] else ("level", self.level[i]))
                if group not in read:
                    read.add(group)
                    size = self.memory[number].bytes
                    if looks_up(self.nodes[i].target):
                        size = min(size, new)
                    if number in weights:
                        work.weight_bytes += size
                    else:
                        work.activation_bytes += size
            for n in made.get(i, ()):  # results that are never read
                if n not in last and n not in kept:
                    live -= self.memory[n].bytes
        return peak, work
