"""The compiled engine: capture, passes, Inductor; falls back to the eager engine where that is impossible.

A program is built once per (kind of batch, block, number of points) and serves every batch size and length, step, η
and ε; its repeated layers are compiled once, and programs share them (:mod:`zowrap.compiler.regions`). The step calls
nothing of the original modules.
"""

from __future__ import annotations

import collections
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import RefusedProgram
from zowrap.compiler.program import Program
from zowrap.compiler.regions import MIN_LAYERS, Kind, Regions, compile_regions
from zowrap.engines.captures import Captures
from zowrap.engines.compile_time import compile_seconds
from zowrap.engines.eager import EagerEngine, realign_slot
from zowrap.errors import Option, ZOCaptureError, ZOError, ZOInternalError, ZOWarning, first_line
from zowrap.loss.module import Batch
from zowrap.ops import codes, kernels
from zowrap.ops.loops import alike
from zowrap.ops.update import update_lowrank_
from zowrap.passes.build import build, build_credit
from zowrap.passes.epilogue import build_epilogue, coefficient_shapes
from zowrap.passes.residual import collect_pieces, sketch_inputs, take_part
from zowrap.passes.select_tunable import UnusedBlock
from zowrap.step import lowrank
from zowrap.step.arithmetic import Conclusion
from zowrap.step.credit import Credit, Piece, each_expert, factors, has_experts
from zowrap.step.directions import squared_norm
from zowrap.step.job import DirectionNoise, Job, Signs
from zowrap.telling import Telling

LOSS, CREDIT = -1, -2  # in the place of a block, in the key of an executable


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
        # Of a model without weights, whose costs alone are asked for, nothing is compiled.
        self.telling = Telling(lambda: compile_seconds(job), "kept for the next start", job.device.type == "meta")
        self.captures = Captures(job.loss, self.telling)
        self.eager = EagerEngine(job, self.captures)
        self.compile_count = 0
        self.executables: dict[tuple, Executable] = {}
        self._kinds: dict[str, Kind] = {}
        self._credited: dict[int, set[int]] = {}  # by captured program: what gets residual credit
        self.fallen_back: str | None = None
        self._warmed: set[tuple] = set()
        self._kept: dict[int, dict[int, Any]] | None = None  # inside one_batch: by executable, what its calls share
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
            with self.captures.one_batch():
                yield
        finally:
            self._kept = None

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
            inputs = self.captures.arguments(
                executable.program, batch, lambda target: self._added_value(target, query, coefficients)
            )
            try:
                kept = None if self._kept is None else self._kept.setdefault(id(executable), {})
                return executable.compiled(*inputs, kept=kept)
            except AssertionError as error:  # Inductor checks the sizes that it relies on, and may have fixed some
                if not self.captures.restrict(batch, self.captured(batch)):
                    first = first_line(error)[:200]
                    raise ZOCaptureError(f"the compiled program does not fit this batch ({first})") from error

    def _executable(self, batch: Batch, query: DirectionNoise | None, points: int) -> Executable:
        while True:
            captured = self.captured(batch)
            key = (id(captured), LOSS if query is None else query.block, points)
            if key in self.executables:
                return self.executables[key]
            try:
                self.executables[key] = self._build(batch, query, points)
            except RefusedProgram:
                if not self.captures.restrict(batch, captured):
                    raise

    def _build(self, batch: Batch, query: DirectionNoise | None, points: int) -> Executable:
        """Make the program of so many points for this kind of batch, and compile it."""
        block, per_example = (-1, False) if query is None else (query.block, query.per_example)
        with self.telling.during("capturing the step", finished=True):
            start = time.perf_counter()
            program = self.program(batch, block, points, per_example)
            self.captures.seconds += time.perf_counter() - start
            with _as_capture_error():
                compiled = compile_regions(program, self._kinds, self.min_layers, self.telling.region, self.shares)
            looked_up = program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb_rows.default)
            self._warm(block, points, rows=bool(looked_up))
        self.compile_count += compiled.compilations
        return Executable(program, compiled)

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
        return self.captures.read_values

    def captured(self, batch: Batch) -> Program:
        """The captured loss for this kind of batch; captured on first need.

        Raises:
            ZOCaptureError: the model cannot be captured.
        """
        return self.captures.find(batch)

    def _added_value(self, target: str, query: DirectionNoise | None, coefficients: Tensor) -> Tensor:
        assert query is not None
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

    # --- residual credit --------------------------------------------------------------------------------------

    @torch.no_grad()
    def credit(self, batch: Batch, signs: Signs, keep_inputs: bool) -> tuple[Tensor, Tensor, list[Piece]]:
        if self.fallen_back is not None:
            return self.eager.credit(batch, signs, keep_inputs)
        try:
            return self._credit(batch, signs, keep_inputs)
        except ZOCaptureError as error:
            result = self.eager.credit(batch, signs, keep_inputs)
            self._fall_back(error)
            return result

    def _credit(self, batch: Batch, signs: Signs, keep_inputs: bool) -> tuple[Tensor, Tensor, list[Piece]]:
        while True:
            if not keep_inputs:
                self._credit_executable(batch, "inputs")  # so that nothing can fail between the forwards of a step
            executable = self._credit_executable(batch, "all" if keep_inputs else "without inputs")
            program = executable.program
            sketch = signs(sketch_inputs(program))
            inputs = self.captures.arguments(program, batch, {"sketch": sketch}.__getitem__)
            try:
                sums, weights, *rest = executable.compiled(*inputs)
            except AssertionError as error:  # Inductor checks the sizes that it relies on
                if not self.captures.restrict(batch, self.captured(batch)):
                    first = first_line(error)[:200]
                    raise ZOCaptureError(f"the compiled program does not fit this batch ({first})") from error
                continue
            return sums.unsqueeze(0), weights, collect_pieces(program.credit, rest, keep_inputs)

    def _credit_executable(self, batch: Batch, part: str) -> Executable:
        """The program that yields credit for this kind of batch, or a part of it."""
        while True:
            captured = self.captured(batch)
            key = (id(captured), CREDIT, part)
            if key in self.executables:
                return self.executables[key]
            try:
                self.executables[key] = self._build_credit(captured, part)
            except RefusedProgram:
                if not self.captures.restrict(batch, captured):
                    raise

    def credit_program(self, captured: Program, part: str) -> Program:
        """The program that yields residual credit, or a part of it (:func:`take_part`), not compiled.

        Raises:
            ZOError: the model has no residual stream, or nothing that moves writes to it.
        """
        return take_part(build_credit(captured.clone(), self.job), part)

    def credited(self, batch: Batch) -> set[int]:
        """Indices of the parameters that get residual credit from this kind of batch."""
        captured = self.captured(batch)
        if id(captured) not in self._credited:
            self._credited[id(captured)] = {use.parameter for use in self.credit_program(captured, "all").credit}
        return self._credited[id(captured)]

    def _build_credit(self, captured: Program, part: str) -> Executable:
        with self.telling.during("capturing the step", finished=True):
            start = time.perf_counter()
            program = self.credit_program(captured, part)
            self.captures.seconds += time.perf_counter() - start
            with _as_capture_error():
                compiled = compile_regions(program, self._kinds, self.min_layers, self.telling.region)
            self._warm(0, 0)
        self.compile_count += compiled.compilations
        return Executable(program, compiled)

    @torch.no_grad()
    def update_with(self, credit: Credit, rounding_keys: Tensor, factor: Tensor, conclusion: Conclusion) -> None:
        if not self._ready(0):
            return self.eager.update_with(credit, rounding_keys, factor, conclusion)
        self.visit_credit(
            credit,
            functools.partial(self._write_credit, rounding_keys=rounding_keys, factor=factor, conclusion=conclusion),
        )
        for name, value in conclusion.state.items():
            self.job.states[0][name].copy_(value)

    @torch.no_grad()
    def visit_credit(self, credit: Credit, visit: Callable[[int, list[Piece]], None]) -> None:
        if self.fallen_back is not None:
            return self.eager.visit_credit(credit, visit)
        if len(credit.pending) == 1 and len(credit.pending[0][1]) == len(credit.pieces):
            return self._visit_on_the_way(*credit.pending[0], visit)
        for batch, pieces in credit.pending:
            self._run_inputs(batch, pieces)
        credit.pending = []
        for i in credit.parameters:
            visit(i, credit.of(i))

    def _run_inputs(self, batch: Batch, pieces: list[Piece]) -> None:
        """The second forward: give each matrix's piece its inputs."""
        executable = self._credit_executable(batch, "inputs")
        found = executable.compiled(*self.captures.arguments(executable.program, batch, _no_sketch))
        matrices = [piece for piece in pieces if piece.use.matrix]
        for piece, x in zip(matrices, found, strict=True):
            piece.x = x

    def _visit_on_the_way(self, batch: Batch, pieces: list[Piece], visit: Callable[[int, list[Piece]], None]) -> None:
        """The second forward, in which each parameter is visited after its last use, and its inputs are let go."""
        executable = self._credit_executable(batch, "inputs")
        matrices = [piece for piece in pieces if piece.use.matrix]
        compiled, program = executable.compiled, executable.program
        ready = _last_needed(executable, self.job, matrices)
        # How many pieces have yet to take a value, and the last call that reads it.
        left = collections.Counter(slot.number for slot in compiled.outputs)
        read = {slot: n for n, call in enumerate(compiled.calls) for slot in left if call.reads(slot)}
        due: dict[int, list[int]] = {}
        for parameter in sorted({piece.use.parameter for piece in pieces}):
            due.setdefault(ready.get(parameter, -1), []).append(parameter)

        def after(number: int, values: list[Any]) -> None:
            for parameter in due.pop(number, []):
                own = [piece for piece in pieces if piece.use.parameter == parameter]
                for piece, slot in zip(matrices, compiled.outputs, strict=True):
                    if piece.use.parameter == parameter:
                        piece.x = values[slot.number]
                        left[slot.number] -= 1
                        if not left[slot.number] and read.get(slot.number, -1) <= number:
                            values[slot.number] = None
                visit(parameter, own)
                for piece in own:
                    piece.x = None

        compiled(*self.captures.arguments(program, batch, _no_sketch), after=after)
        for parameter in due.pop(-1, []):
            visit(parameter, [piece for piece in pieces if piece.use.parameter == parameter])

    def _write_credit(
        self, index: int, pieces: list[Piece], rounding_keys: Tensor, factor: Tensor, conclusion: Conclusion
    ) -> None:
        """Write the update of one parameter."""
        job, parameter = self.job, self.job.parameters[index]
        tensor, slots = parameter.tensor.detach(), list(job.slots_of(index).values())
        parts = [(tensor, slots, pieces)]
        if has_experts(pieces):
            count = tensor.shape[0]
            parts = [(tensor[e], [slot[e] for slot in slots], own) for e, own in enumerate(each_expert(pieces, count))]
        for number, (part, part_slots, own) in enumerate(parts):
            update_lowrank_(
                part,
                part_slots,
                *factors(own, factor),
                rounding_keys[index],
                [value for name, value in conclusion.coefficients.items() if name != "g"],
                [job.hyper["lr"], job.hyper["eps"], job.hyper["weight_decay"]],
                conclusion.apply,
                job.decays and parameter.decays,
                self.kernels.key,
                number * part.numel(),
            )

    # --- falling back -----------------------------------------------------------------------------------------

    def _fall_back(self, error: ZOCaptureError) -> None:
        """Run eagerly from now on, or raise where that was ruled out."""
        if not self.fall_back:
            raise ZOCaptureError(Option("engine", "compiled"), f" was asked for, but {error}") from error
        self.fallen_back, self.captures.refused = str(error), None
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

    def _name_of(self, block: int, points: int | str) -> str:
        if block == CREDIT:
            return {"inputs": "inputs of products"}.get(str(points), "loss and residual credit")
        return "loss" if block < 0 else f"{points} points, block {self.job.blocks[block].name}"

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
            "trace_seconds": self.captures.seconds,
            "programs": {
                f"{i}: {self._name_of(*key[1:])}": executable.program
                for i, (key, executable) in enumerate(self.executables.items())
            },
        }


def _no_sketch(target: str) -> Tensor:
    raise ZOInternalError(f"a forward for the inputs of products asks for {target}")


def _last_needed(executable: Executable, job: Job, matrices: list[Piece]) -> dict[int, int]:
    """By parameter: the last call that makes an input of its product or reads it."""
    compiled, program = executable.compiled, executable.program
    made = {slot: number for number, call in enumerate(compiled.calls) for slot in call.results}
    last: dict[int, int] = {}
    for piece, slot in zip(matrices, compiled.outputs, strict=True):
        number = made.get(slot.number, -1)
        last[piece.use.parameter] = max(last.get(piece.use.parameter, -1), number)
    names = {f"model.{name}": i for i, parameter in enumerate(job.parameters) for name in parameter.names}
    for place, given in enumerate(program.inputs):
        parameter = names.get(given.target) if given.kind == "parameter" else None
        if parameter is not None:
            readers = [number for number, call in enumerate(compiled.calls) if call.reads(place)]
            last[parameter] = max([last.get(parameter, -1), *readers])
    return last


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


def _direction_scalar_names(job: Job) -> list[str]:
    if job.rule.direction_scalars is None:
        return []
    sums = {"count": torch.tensor(float(job.count(0)), dtype=torch.float64, device=job.device)}
    if job.rule.reduce is not None:
        one = {name: torch.zeros(1, device=job.device) for name in job.slots}
        sums.update({name: value.double().sum() for name, value in job.rule.reduce(one).items()})
    return list(job.rule.direction_scalars(job.states[0], sums, job.hyper))
