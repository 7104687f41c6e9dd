"""Compute the cost of a whole program at given sizes, region by region, including the values held between regions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from zowrap.analysis.operators import Work, merged
from zowrap.analysis.region import Analysis, analyse
from zowrap.compiler.program import Program
from zowrap.compiler.regions import Region, cut, text_of
from zowrap.custom_op import PersistentBuffers
from zowrap.errors import ZOCaptureError, first_line
from zowrap.loss.module import Batch


@dataclass
class ProgramCost:
    """The cost of a program at given sizes.

    Attributes:
        regions: each region with its analysis, in execution order; regions that compute the same share one analysis.
        transient: peak bytes allocated in addition to the program's inputs.
        held: bytes of its outputs, which are part of that.
        buffers: buffers that its operators keep from step to step.
    """

    program: Program
    regions: list[tuple[Region, Analysis]]
    transient: int
    held: int
    work: Work
    buffers: PersistentBuffers


class ProgramCosts:
    """Computes the costs of programs for batches of one size; regions that compute the same are analysed once.

    Args:
        batch: tensors of the given sizes, on any device; their values are not read.
        min_layers, share: as in the compilation of the programs, see :func:`zowrap.compiler.regions.cut`.
    """

    def __init__(self, batch: Batch, min_layers: int, share: bool = False) -> None:
        self.batch, self.min_layers, self.share = batch, min_layers, share
        self.mode = FakeTensorMode()
        self._analyses: dict[tuple, Analysis] = {}

    def cost(self, program: Program, holds: bool = True) -> ProgramCost:
        """Compute the cost of a program at the batch's sizes.

        Args:
            holds: its outputs stay in memory until it ends; otherwise each is used and let go when it is made.

        Raises:
            ZOCaptureError: sizes inside the program depend on its data.
        """
        try:
            regions = self._analyse(program)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            first = first_line(error, "")
            raise ZOCaptureError(
                f"the sizes inside this model depend on its data ({type(error).__name__}: {first[:160]})"
            ) from error
        work = sum((analysis.work for _, analysis in regions), Work())
        buffers = merged(analysis.buffers for _, analysis in regions)
        transient, held = _transient(program, regions, holds)
        return ProgramCost(program, regions, transient, held, work, buffers)

    def sizes(self, program: Program, node: fx.Node) -> list[int]:
        """Return the sizes of a node's value at the batch's sizes."""
        number = self._numbers(program)
        return [number(size) for size in node.meta["val"].shape]

    def _analyse(self, program: Program) -> list[tuple[Region, Analysis]]:
        """Return every region of a program with its analysis, in order."""
        pieces = cut(program, self.min_layers, self.share)
        values = self._inputs(program)
        weights = {g.node for g in program.inputs if g.kind in ("parameter", "buffer", "constant")}
        found: list[tuple[Region, Analysis]] = []
        with torch.no_grad(), self.mode:
            for node in pieces.glue:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for region in pieces.regions:
                given = [values[n] for n in region.inputs]
                is_weight = [n.name in weights for n in region.inputs]
                key = (text_of(region), *map(_described, given), *is_weight)
                if key not in self._analyses:
                    self._analyses[key] = analyse(region, given, is_weight, self.mode)
                analysis = self._analyses[key]
                values.update(zip(region.outputs, analysis.outputs, strict=True))
                found.append((region, analysis))
        return found

    def bytes_of_all_values(self, program: Program) -> int:
        """Return the bytes of all values that a captured program reads or computes, as if none were freed.

        Values that share a storage count once. Nothing is executed: the shapes are those found by capture.

        Raises:
            ZOCaptureError: sizes inside the program depend on its data.
        """
        number = self._numbers(program)
        memory: dict[int, int] = {}
        try:
            for node in program.graph.nodes:
                for value in tree_leaves(node.meta.get("val")):
                    if isinstance(value, Tensor):
                        storage = value.untyped_storage()
                        memory[storage._cdata] = number(storage.nbytes())
        except TypeError as error:
            raise ZOCaptureError("the sizes inside this model depend on its data") from error
        return sum(memory.values())

    def _numbers(self, program: Program) -> Callable[[Any], int]:
        """Return a function that evaluates a symbolic size of the program at the batch's sizes."""
        sizes: dict[Any, int] = {}
        for node, given in zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
            if given.kind == "batch" and isinstance(self.batch[given.target], Tensor):
                for symbol, size in zip(node.meta["val"].shape, self.batch[given.target].shape, strict=True):
                    if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_symbol:
                        sizes[symbol.node.expr] = size
        substituted = functools.cache(lambda expression: int(expression.subs(sizes)))  # few, for thousands of sizes
        return lambda size: substituted(size.node.expr) if isinstance(size, torch.SymInt) else size

    def _inputs(self, program: Program) -> dict[fx.Node, Any]:
        """Return fake values of the program's inputs at the batch's sizes."""
        number = self._numbers(program)
        values: dict[fx.Node, Any] = {}
        with self.mode:
            for node in program.graph.find_nodes(op="placeholder"):
                value = node.meta["val"]
                if isinstance(value, Tensor):
                    value = torch.empty([number(s) for s in value.shape], dtype=value.dtype, device=value.device)
                values[node] = value
        return values


def _transient(program: Program, regions: Sequence[tuple[Region, Analysis]], holds: bool) -> tuple[int, int]:
    """Return the peak bytes of a program's regions and of the values held between them, and those of its outputs."""
    lies_in: dict[fx.Node, Any] = {}  # value → (region, number) of its memory; program inputs are absent
    last: dict[Any, int] = {}
    sizes: dict[Any, int] = {}
    for i, (region, analysis) in enumerate(regions):
        for node in region.inputs:
            if node in lies_in:
                last[lies_in[node]] = i
        for node, owner in zip(region.outputs, analysis.owners, strict=True):
            if owner is None:
                continue
            kind, number = owner
            memory = lies_in.get(region.inputs[number]) if kind == "input" else (i, number)
            if memory is None:
                continue
            lies_in[node] = memory
            last[memory] = i
            if kind == "own":
                sizes[memory] = analysis.own[number]
    outputs = {lies_in[node] for node in program.graph.output_node().all_input_nodes if node in lies_in}
    if holds:
        last.update(dict.fromkeys(outputs, len(regions)))
    live = peak = 0
    for i, (_, analysis) in enumerate(regions):
        peak = max(peak, live + analysis.peak)
        live += sum(size for memory, size in sizes.items() if memory[0] == i)
        live -= sum(size for memory, size in sizes.items() if last[memory] == i)
    return peak, sum(sizes.get(memory, 0) for memory in outputs) if holds else 0


def _described(value: Any) -> Any:
    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else repr(value)
