"""The compiled engine: capture, passes, Inductor; falls back to the eager engine where that is impossible.

A program is built once per (kind of batch, block, number of points) and serves every batch size and length, step, η
and ε; its repeated layers are compiled once, and programs share them (:mod:`zowrap.compiler.regions`). The step calls
nothing of the original modules.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.capture import FREEDOMS, ROWS_ALONE, batch_signature, canonical_batch, capture
from zowrap.compiler.inductor import RefusedProgram
from zowrap.compiler.program import Program
from zowrap.compiler.regions import MIN_LAYERS, Kind, Regions, compile_regions
from zowrap.engines.compile_time import compile_seconds
from zowrap.engines.eager import EagerEngine, realign_slot
from zowrap.errors import Option, ZOCaptureError, ZOError, ZOWarning, first_line
from zowrap.loss.module import Batch
from zowrap.ops import codes, kernels
from zowrap.ops.loops import alike
from zowrap.passes.build import build
from zowrap.passes.epilogue import build_epilogue, coefficient_shapes
from zowrap.passes.select_tunable import UnusedBlock
from zowrap.step import lowrank
from zowrap.step.arithmetic import Conclusion
from zowrap.step.directions import squared_norm
from zowrap.step.job import DirectionNoise, Job
from zowrap.telling import Telling

MAX_FIXED_SIZES = 8  # programs per kind of batch where export cannot make a size dynamic; each costs a compilation
# Of a program for one size: a model that loops over positions is as many times as long, and compiles for minutes.
MAX_OWN_NODES = 10_000
MAX_KINDS = 16  # kinds of batch; more come only where a value that is no tensor changes from step to step


@dataclass
class Executable:
    """A program and its machine code."""

    program: Program
    compiled: Regions


class CompiledEngine:
    """See the module.

    Args:
        points: evaluations of one step.
        fall_back: what cannot be captured or compiled runs eagerly, with one warning; otherwise it is an error.
    """

    name = "compiled"

    def __init__(self, job: Job, points: int, fall_back: bool = True) -> None:
        self.job, self.fall_back = job, fall_back
        self.eager = EagerEngine(job)
        self.compile_count = 0
        self.trace_seconds = 0.0
        self.executables: dict[tuple, Executable] = {}
        self._kinds: dict[str, Kind] = {}
        self.fallen_back: str | None = None
        self._captured: dict[tuple, list[Program]] = {}
        self._restricted: list[Program] = []  # kept, because executables are found by the identity of their program
        self._first_freedom: dict[tuple, int] = {}  # by kind of batch: the first of FREEDOMS that the compiler may take
        self._refused: tuple[Batch, ZOCaptureError] | None = None
        self._warmed: set[tuple] = set()
        # Inside one_batch: by executable, what its evaluations share; and the model's tensors by name.
        self._kept: dict[int, dict[int, Any]] | None = None
        self._tensors: dict[str, Tensor] | None = None
        # Of a model without weights, whose costs alone are asked for, nothing is compiled.
        self.telling = Telling(lambda: compile_seconds(job), "kept for the next start", job.device.type == "meta")
        self._scalar_names = _direction_scalar_names(job)
        shapes = coefficient_shapes(job, points)
        names = list(shapes)
        numbers = [*self._scalar_names, *job.rule.slot_names("parameter")]
        self.kernels = kernels.register(kernels.Kernels(job.rule, job.direction, shapes, numbers, job.second_point))
        self._epilogues = [
            build_epilogue(job, b, self.kernels.key, names, self._scalar_names) for b in range(len(job.blocks))
        ]

    # --- evaluations ------------------------------------------------------------------------------------------

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        self._kept = {}
        try:
            yield
        finally:
            self._kept = self._tensors = None

    @torch.no_grad()
    def losses(self, batch: Batch, query: DirectionNoise | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        if self.fallen_back is not None:
            return self.eager.losses(batch, query, coefficients)
        points = 0 if query is None else coefficients.shape[0]
        try:
            *sums, weights = self._run(batch, query, coefficients, points)
        except ZOCaptureError as error:
            if not self.fall_back:
                raise ZOCaptureError(Option("engine", "compiled"), f" was asked for, but {error}") from error
            result = self.eager.losses(batch, query, coefficients)  # a batch that is wrong says so here
            self._fall_back(error)
            return result
        rows = torch.stack(list(sums))
        # The plain loss stands for all points of a block that it does not depend on.
        return rows.expand(points, -1) if len(rows) < points else rows, weights

    def _run(self, batch: Batch, query: DirectionNoise | None, coefficients: Tensor, points: int) -> Sequence[Tensor]:
        """The outputs of the program for this batch."""
        while True:
            executable = self._executable(batch, query, points)
            inputs = self._arguments(executable.program, batch, query, coefficients)
            try:
                kept = None if self._kept is None else self._kept.setdefault(id(executable), {})
                return executable.compiled(*inputs, kept=kept)
            except AssertionError as error:  # Inductor checks the sizes that it relies on, and may have fixed some
                if not self._restrict(batch, self.captured(batch)):
                    first = first_line(error)[:200]
                    raise ZOCaptureError(f"the compiled program does not fit this batch ({first})") from error

    def _executable(self, batch: Batch, query: DirectionNoise | None, points: int) -> Executable:
        while True:
            captured = self.captured(batch)
            key = (id(captured), -1 if query is None else query.block, points)
            if key in self.executables:
                return self.executables[key]
            try:
                self.executables[key] = self._build(batch, query, points)
            except RefusedProgram:
                if not self._restrict(batch, captured):
                    raise

    def _build(self, batch: Batch, query: DirectionNoise | None, points: int) -> Executable:
        """Make the program of so many points for this kind of batch, and compile it."""
        block, per_example = (-1, False) if query is None else (query.block, query.per_example)
        with self.telling.during("capturing the step", finished=True):
            start = time.perf_counter()
            program = self.program(batch, block, points, per_example)
            self.trace_seconds += time.perf_counter() - start
            with _as_capture_error():
                compiled = compile_regions(program, self._kinds, self.min_layers, self.telling.region, self.shares)
            looked_up = program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb_rows.default)
            self._warm(block, points, rows=bool(looked_up))
        self.compile_count += compiled.compilations
        return Executable(program, compiled)

    def _restrict(self, batch: Batch, refused: Program) -> bool:
        """Leave fewer sizes of this kind of batch open, where the compiler has refused a program of more.

        Convolutions with strides make sizes that it cannot express, and images mostly have one size.

        Returns:
            Whether there is anything left to fix; the next :meth:`captured` does so.
        """
        first = ROWS_ALONE if refused.freedom < ROWS_ALONE else len(FREEDOMS) - 1
        if refused.freedom >= first or not refused.varies:
            return False
        kind = batch_signature(batch)
        self._first_freedom[kind] = first
        self._restricted.append(refused)
        self._captured[kind] = [program for program in self._captured[kind] if program is not refused]
        return True

    @property
    def min_layers(self) -> int:
        """With fewer layers a program is compiled as a whole, see :mod:`zowrap.compiler.regions`."""
        return 2 if len(self.job.blocks) > 1 else MIN_LAYERS

    @property
    def shares(self) -> bool:
        """Whether a step evaluates several directions on one batch: what none of them reaches is computed once."""
        return self.job.queries > 1

    def program(self, batch: Batch, block: int, points: int, per_example: bool = False) -> Program:
        """The program of so many evaluations along one direction of a block, not compiled; ``points`` 0: of θ itself.

        Of several blocks one may take no part in the loss (the pooler of an encoder whose hidden states are used): its
        program is the loss at θ, which is the loss at all its points.

        It depends on the kind of ``batch`` alone, so that a batch on the ``meta`` device serves a model there.

        Raises:
            ZOCaptureError: the model cannot be captured.
        """
        job, captured, epilogue, key = self.job, self.captured(batch), self._epilogues[block], self.kernels.key
        with _as_capture_error():
            try:
                return build(captured.clone(), job, block, key, points, self._scalar_names, epilogue, per_example)
            except UnusedBlock:
                if len(job.blocks) == 1:
                    raise
                return build(captured.clone(), job, block, key, 0, self._scalar_names, epilogue)

    @property
    def reads_values(self) -> bool:
        """Whether values of a batch decide which program it needs."""
        return any(program.guards.read_values for programs in self._captured.values() for program in programs)

    def captured(self, batch: Batch) -> Program:
        """The captured loss for this kind of batch; captured on first need.

        Raises:
            ZOCaptureError: the model cannot be captured.
        """
        kind = batch_signature(batch)
        if kind not in self._captured and len(self._captured) == MAX_KINDS:
            raise ZOCaptureError(_too_many(list(self._captured)))
        programs = self._captured.setdefault(kind, [])
        for program in programs:
            if program.accepts(batch):
                return program
        if self._refused is not None and self._refused[0] is batch:  # who asks twice does not wait twice
            raise self._refused[1]
        start = time.perf_counter()
        try:
            with self.telling.during("capturing the step"):
                return self._capture(batch, programs)
        except ZOCaptureError as error:
            self._refused = batch, error
            raise
        finally:
            self.trace_seconds += time.perf_counter() - start

    def _capture(self, batch: Batch, programs: list[Program]) -> Program:
        """Capture one more program for this kind of batch."""
        if len(programs) == MAX_FIXED_SIZES:
            raise ZOCaptureError(
                f"what this model does depends on the sizes of its inputs, and {MAX_FIXED_SIZES} sizes were captured "
                f"already (pad every batch to one size)"
            )
        loss, first = self.job.loss, self._first_freedom.get(batch_signature(batch), 0)
        if first:  # the compiler has refused a program that leaves more sizes open
            example = batch if first > ROWS_ALONE else canonical_batch(batch, loss.model, lengths=False)
            programs.append(capture(loss, example, first, len(FREEDOMS) - 1))
            if programs[-1].accepts(batch):
                return programs[-1]
            programs.pop()
        elif all(each.guards.read_values for each in programs):  # another way may leave as many sizes open
            programs.append(capture(loss, canonical_batch(batch, loss.model)))
            if programs[-1].accepts(batch):
                return programs[-1]
            programs.pop()  # the canonical sizes got fixed, or the model does something else at the batch's own
        own = capture(loss, batch, first, len(FREEDOMS) - 1)
        count = len(own.graph.nodes)
        if count > MAX_OWN_NODES:
            raise ZOCaptureError(
                f"what this model does depends on the sizes of its inputs, and a program for this size alone would "
                f"have {count:,} operations"
            )
        own.guards.accept(batch)
        if not own.accepts(batch):
            raise ZOCaptureError("this model branches on other values when it runs again")
        programs.append(own)
        return own

    def _arguments(
        self, program: Program, batch: Batch, query: DirectionNoise | None, coefficients: Tensor
    ) -> list[Any]:
        named = self._named_tensors()
        values: list[Any] = []
        for given in program.inputs:
            if given.kind == "batch":
                value = batch[given.target]
                values.append(value.contiguous() if isinstance(value, Tensor) else value)  # as it was compiled for
            elif given.kind == "added":
                assert query is not None
                values.append(self._added_value(given.target, query, coefficients))
            else:
                values.append(named[given.target] if given.target in named else program.constants[given.target])
        return values

    def _named_tensors(self) -> dict[str, Tensor]:
        """The model's tensors by name. They are looked up once a batch: between batches a user may exchange them."""
        if self._tensors is not None:
            return self._tensors
        named: dict[str, Tensor] = dict(self.job.loss.named_parameters(remove_duplicate=False))
        named.update(self.job.loss.named_buffers(remove_duplicate=False))
        if self._kept is not None:
            self._tensors = named
        return named

    def _added_value(self, target: str, query: DirectionNoise, coefficients: Tensor) -> Tensor:
        if target == "factors":
            assert query.factors is not None
            return query.factors if query.per_example else query.factors[0]
        if target in ("keys", "scale"):
            return getattr(query, target)
        if target == "coefficients":
            return coefficients
        kind, *rest = target.split("/")
        return query.scalars[rest[0]] if kind == "scalar" else self.job.slots[rest[0]][int(rest[1])]

    def _warm(self, block: int, points: int, rows: bool = False) -> None:
        """Compile every kernel that a step of the block needs, before anything is evaluated or written."""
        job = self.job
        parameters = [job.parameters[i] for i in job.blocks[block].indices]
        kinds = {
            (torch.float32 if p.codes else p.tensor.dtype, job.decays and p.decays, size)
            for p in parameters
            for size in (alike(p.tensor.numel()), 16)  # as a whole, and in chunks
        }
        for dtype, decay, size in sorted(kinds, key=str):
            wide = rows and size == 16  # as rows of embeddings are
            if (kind := (dtype, decay, points, wide, size)) not in self._warmed:
                self.telling.now("compiling the update")
                self.kernels.warm(dtype, job.device, job.queries, points, decay, wide, size)
                self._warmed.add(kind)
        for columns in {alike(p.tensor.shape[1]) for p in parameters if p.codes}:
            if ("codes", columns) not in self._warmed:
                codes.warm(self.kernels, job.device, columns)
                self._warmed.add(("codes", columns))

    # --- falling back -----------------------------------------------------------------------------------------

    def _fall_back(self, error: ZOCaptureError) -> None:
        """Run eagerly from now on, or raise where that was ruled out."""
        if not self.fall_back:
            raise ZOCaptureError(Option("engine", "compiled"), f" was asked for, but {error}") from error
        self.fallen_back, self._refused = str(error), None
        warnings.warn(
            f"running eagerly, because {error}. Steps are several times slower and need one more copy of the tunable "
            f"parameters; engine='eager' silences this, engine='compiled' makes it an error.",
            ZOWarning,
            stacklevel=4,
        )

    # --- the update -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def squared_norm(self, block: int, keys: Tensor) -> Tensor:
        if not self._ready(block):
            return self.eager.squared_norm(block, keys)
        total = torch.zeros((), dtype=torch.int64, device=keys.device)
        for i in self.job.blocks[block].indices:
            total = total + self.kernels.perturbation.squared_norm(self.job.parameters[i].tensor.view(-1), keys[i])
        return squared_norm(total)

    @torch.no_grad()
    def factors(self, block: int, keys: Tensor, right_keys: Tensor) -> Tensor:
        if not self._ready(block):
            return self.eager.factors(block, keys, right_keys)
        layout = self.job.layouts[block]
        return self.kernels.perturbation.factors(layout, keys, right_keys)

    @torch.no_grad()
    def update(self, queries: Sequence[DirectionNoise], rounding_keys: Tensor, conclusion: Conclusion) -> None:
        job, block = self.job, queries[0].block
        if not self._ready(block):
            return self.eager.update(queries, rounding_keys, conclusion)
        epilogue, layout = self._epilogues[block], job.layouts[block] if job.layouts else None
        inputs: list[Tensor] = [] if layout else [s.keys for s in queries] + [s.scale for s in queries]
        inputs += [queries[0].scalars[name] for name in self._scalar_names]
        inputs += [rounding_keys, *[conclusion.coefficients[name] for name in epilogue.coefficient_names]]
        inputs += [job.hyper["lr"], job.hyper["eps"], job.hyper["weight_decay"], conclusion.apply]
        buffer = torch.cat([s.factors for s in queries if s.factors is not None]) if layout else None
        for i in job.blocks[block].indices:
            inputs += [job.parameters[i].tensor, *job.slots_of(i).values()]
            inputs += [job.slots[name][i] for name in job.rule.slot_names("parameter")]
            if job.parameters[i].codes and (row_scale := job.parameters[i].scale) is not None:
                inputs.append(row_scale)
            if layout and buffer is not None:
                slot = job.left_of(i)
                left = None if slot is None else realign_slot(job, queries, i, slot, conclusion)
                pair = lowrank.update_factors(layout, i, buffer, conclusion.coefficients["g"], left)
                inputs += [factor for factor in pair if factor is not None]
        epilogue.graph_module(*[t.detach() for t in inputs])
        for name, value in conclusion.state.items():
            job.states[block][name].copy_(value)

    def _ready(self, block: int) -> bool:
        """Whether the compiled kernels of a block can be used; compiles them on first need."""
        if self.fallen_back is None:
            try:
                self._warm(block, 0)
            except ZOCaptureError as error:
                self._fall_back(error)
        return self.fallen_back is None

    # --- facts ------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        if self.fallen_back is not None:
            return {**self.eager.describe(), "fallen_back": self.fallen_back}
        hashes = sorted(e.program.fingerprint() for e in self.executables.values())
        return {
            "engine": self.name,
            "program_hash": "-".join(hashes) or None,
            "compile_count": self.compile_count,
            "compile_seconds": sum(e.compiled.seconds for e in self.executables.values()),
            "cached": sum(e.compiled.cached for e in self.executables.values()),
            "trace_seconds": self.trace_seconds,
            "programs": {
                f"{i}: {points} points, block {self.job.blocks[block].name}" if block >= 0 else f"{i}: loss": e.program
                for i, ((_, block, points), e) in enumerate(self.executables.items())
            },
        }


@contextmanager
def _as_capture_error() -> Iterator[None]:
    """Turn a failure of the passes or the compiler into an error that lets the eager engine take over."""
    try:
        yield
    except (ZOError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error, '')[:200]}"
        raise RefusedProgram(f"this model cannot be compiled ({what})") from error


def _too_many(kinds: list[tuple]) -> str:
    """Why batches of so many kinds cannot all be captured: the value that differs, if there is one."""
    constants = [{part[0]: part[1] for part in kind if len(part) == 2} for kind in kinds]
    for name in constants[-1]:
        if len({found.get(name) for found in constants}) > len(kinds) // 2:
            return (
                f"{name!r} differs from batch to batch and is not a tensor, so each of its values needs a program of "
                f"its own (give it as a tensor, or leave it out)"
            )
    return f"the batches are of more than {MAX_KINDS} kinds (names, dtypes and numbers of dimensions of what they hold)"


def _direction_scalar_names(job: Job) -> list[str]:
    if job.rule.direction_scalars is None:
        return []
    sums = {"count": torch.tensor(float(job.count(0)), dtype=torch.float64, device=job.device)}
    if job.rule.reduce is not None:
        one = {name: torch.zeros(1, device=job.device) for name in job.slots}
        sums.update({name: value.double().sum() for name, value in job.rule.reduce(one).items()})
    return list(job.rule.direction_scalars(job.states[0], sums, job.hyper))
