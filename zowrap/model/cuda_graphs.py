"""Capture a step once and replay it: on a GPU a whole step, update included, is one CUDA graph.

A replayed step runs no Python of the model, the passes or the rule, and launches nothing by itself. What differs from
step to step lies on the device: the batch, the step's number (from which all noise follows), η, ε and the rule's state.
Whether a step that is not finite is skipped is decided there, too, and nothing waits for the device.

A kind of batch (its names, shapes and dtypes) is captured when it comes for the second time: the first one compiles.
At most :data:`MOST` are kept for each block; further kinds run as they are, which is slower and otherwise the same.
All go, and their memory with them, when the seed, the schedule or the place of a weight is another: none fits then.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from zowrap.engines.compiled import CompiledEngine
from zowrap.errors import ZOError, ZOWarning, first_line
from zowrap.model.result import StepResult
from zowrap.model.wrapped import Wrapped
from zowrap.ops import scratch
from zowrap.quant.layers import Int8Linear

# Recordings share one pool of memory; each keeps about as much beside it as its batch takes.
MOST = 8

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Any]], Replay]


@dataclass
class CapturedStep:
    """One kind of batch.

    Attributes:
        batch: where the next batch is copied to.
        result: where the step's tensors lie after a replay.
        held: scratch that the captured kernels write to; it must outlive them.
    """

    batch: dict[str, Tensor]
    replay: Replay
    result: StepResult
    held: list[Any]


class GraphCache:
    """The captured steps of one model.

    Args:
        capture: calls a function of no arguments, which makes a step and returns its result, and captures the work on
            the device; returns a function that replays it, into the tensors of that result.
    """

    def __init__(self, zm: Wrapped, capture: Capture) -> None:
        self.zm, self.capture = zm, capture
        self.captured: dict[Hashable, CapturedStep] = {}
        self.seen: set[Hashable] = set()
        self.under: Hashable = None
        self.number = torch.zeros((), dtype=torch.int64, device=zm.job.device)
        self.failed = False

    def step(self, batch: dict[str, Any]) -> StepResult | None:
        """The step on ``batch``, or None where it has to run as it is."""
        zm, engine = self.zm, cast(CompiledEngine, self.zm.engine)
        if self.failed or math.isnan(zm.lr) or engine.fallen_back is not None or engine.reads_values:
            return None
        inputs = zm.prepare(batch)
        under = self._under()
        if under != self.under:
            self.captured.clear()
            self.seen.clear()
            self.under = under
        key = self._key(inputs)
        if key not in self.captured:
            if key not in self.seen or len(self.captured) >= MOST * len(zm.job.blocks):
                self.seen.add(key)
                return None
            try:
                self.captured[key] = self._capture_step(inputs)
            except ZOError:
                raise
            except Exception as error:  # of the driver, the allocator or a compiler: the step itself has run before
                self.failed = True
                self.captured.clear()  # none is replayed any more
                first = first_line(error)[:200]
                warnings.warn(f"steps are not captured as CUDA graphs, because {first}", ZOWarning, stacklevel=4)
                return None
        return self._replay(self.captured[key], inputs)

    def _under(self) -> Hashable:
        """The conditions of all captured steps: seed, schedule, and the memory that the weights lie in."""
        zm = self.zm
        return zm.seed, zm.schedule.sequential, tuple(t.data_ptr() for t in self._tensors())

    def _key(self, inputs: dict[str, Any]) -> Hashable:
        """The key of a captured step: the kind of batch, and the block."""
        kinds = tuple(
            (name, v.shape, v.dtype) if isinstance(v, Tensor) else (name, repr(v)) for name, v in inputs.items()
        )
        return kinds, self.zm.block

    def _tensors(self) -> Iterator[Tensor]:
        return itertools.chain(self.zm.model.parameters(), self.zm.model.buffers())

    def _capture_step(self, inputs: dict[str, Any]) -> CapturedStep:
        zm, count = self.zm, self.zm.step_count
        static = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        result: list[StepResult] = []

        def step() -> StepResult:
            zm.accumulate(**static)
            result.append(zm.update())
            return result[0]

        zm.device_step = self.number
        try:
            replay = self.capture(step)
        finally:
            # A captured step has not happened.
            zm.device_step, zm.step_count, zm.update_interrupted = None, count, False
            zm.discard()
        batch = {name: v for name, v in static.items() if isinstance(v, Tensor)}
        return CapturedStep(batch, replay, result[0], scratch.all_buffers())

    def _replay(self, captured: CapturedStep, inputs: dict[str, Any]) -> StepResult:
        zm = self.zm
        self.number.fill_(zm.step_count)
        facts = zm.describe_step()
        for name, tensor in captured.batch.items():
            tensor.copy_(inputs[name], non_blocking=True)
        with zm.writing():
            captured.replay()
            zm.step_count += 1
        own, weights = captured.result, captured.result.weights
        result = replace(
            own,
            loss=own.loss.clone(),
            projected_grad=own.projected_grad.clone(),
            skipped=own.skipped.clone(),
            losses=own.losses.clone(),
            weights=None if weights is None else weights.clone(),
            _facts=facts,
        )
        zm.discard()
        return result


def cuda_graph(device: torch.device) -> Capture:
    """Records CUDA graphs on ``device``. They share one pool of memory, since no two run at the same time."""
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def capture(step: Callable[[], Any]) -> Replay:
        nonlocal pool
        with torch.cuda.device(device):
            if not alive:  # the allocator takes no graph into a pool that its last graph has left
                pool = torch.cuda.graph_pool_handle()
            graph, before, began = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), False
            try:
                # Other threads (a data loader that pins memory) may go on calling the driver meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    began = True
                    step()
            except BaseException:
                torch.cuda.set_stream(before)  # a capture that broke off leaves its own stream current
                if began:
                    _clean_up(graph, pool)
                raise
            alive.add(graph)
        return graph.replay

    return capture


# Graphs whose capture broke off: the allocator of pinned memory may go on asking them whose stream it serves.
_broken: list[torch.cuda.CUDAGraph] = []


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Undo on the current device what a capture that broke off leaves behind in the allocator.

    When the driver refuses to end a capture, torch up to 2.13.0 forgets part of what it set up. In 2.11 the allocator
    goes on as if the capture ran, and asks a graph that is gone which stream is its own. Up to 2.13.0 the pool counts
    as in use for good, so that the steps that now run as they are never get its memory back. Later versions undo all of
    it themselves, and undoing it twice would end the process.
    """
    if torch.__version__ >= "2.13.1":  # compared as versions
        return
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # the capture was ended well, it was the step in it that failed
    _broken.append(graph)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        if hasattr(torch._C, name):
            with contextlib.suppress(RuntimeError):  # since 2.12 the first of them is done already
                getattr(torch._C, name)(torch.cuda.current_device(), pool)


def build_graph_cache(zm: Wrapped) -> GraphCache | None:
    """Build the cache of captured steps of ``zm``; None where they cannot be captured, or nothing would be gained."""
    job = zm.job
    if job.device.type != "cuda" or not can_be_captured(zm):
        return None
    return GraphCache(zm, cuda_graph(job.device))


def can_be_captured(zm: Wrapped) -> bool:
    """Whether a step is the same work every time, and never waits for the device.

    That is: compiled, no state that is renewed on some steps alone, no residual credit, which sorts tokens by expert on
    the host, and no 8-bit layer with a threshold, which reads from the device whether there are columns to multiply
    apart. Whether the model branches on values of its batch is known after its first step.
    """
    waits = any(isinstance(module, Int8Linear) and module.threshold > 0 for module in zm.model.modules())
    plain = zm.job.rule.refresh is None and not zm.job.estimator.credit
    return isinstance(zm.engine, CompiledEngine) and plain and not waits
