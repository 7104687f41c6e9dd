"""``inspect()``: a report of the parameters that move and of the costs, as text, JSON and attributes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zowrap.errors import ZOCaptureError
from zowrap.machine import format_bytes
from zowrap.model.schedule import Schedule
from zowrap.numerics.dtypes import is_16_bit
from zowrap.quant import modes
from zowrap.rules.registry import REGISTRY
from zowrap.step.job import Engine, Job

if TYPE_CHECKING:
    from zowrap.analysis.costs import Costs
    from zowrap.step.parameters import Parameter

_EAGER = "the eager engine evaluates each point by itself"


@dataclass
class Report:
    """Facts about a wrapped model.

    Attributes:
        engine: ``"compiled"`` or ``"eager"``; what runs now. Capture happens at the first step.
        fallen_back: why the eager engine runs although the compiled one was meant to, or None.
        program_hash: identifies the compiled programs; None before the first step and for the eager engine.
        compile_count: regions compiled so far (:mod:`zowrap.compiler.regions`): it does not grow with the number of
            layers, nor with lr, eps, step, batch size or length, nor with blocks once each kind has been met.
        cached: how many of those lay ready from an earlier process (:mod:`zowrap.compiler.cache`).
        trace_seconds, compile_seconds: spent on capture and passes, and on making machine code ready.
        schedule: ``"paired"`` or ``"sequential"``, see ``memory`` in :func:`zowrap.zo_wrap`; ``"auto"`` before the
            first step.
        schedule_why: why that one, in words.
        blocks: ``(name, number of elements)``; one block per step is perturbed and updated.
        moves: ``(canonical name, shape, dtype, how it is rounded)`` of every parameter that moves.
        selected: what the named selections that chose them stand for.
        frozen: number of elements that stay as they are.
        state_bytes: memory of the rule's state.
        forwards: evaluations per step.
        programs: ``(pass, program as Python)`` after each pass, for each compiled program.
        notes: what each pass did.
        estimate: works out :attr:`costs`; None before the first batch.
        costs_unknown: why there are no costs, once they were asked for.
        credit: of residual credit: what is exact of it, and what is not.
        quantized: how quantised weights move, and why so; None where there are none.
        count_full: counts :attr:`full_rows`; it reads all codes.
    """

    engine: str
    rule: str
    direction: str
    forwards: int
    schedule: str
    schedule_why: str
    blocks: list[tuple[str, int]]
    moves: list[tuple[str, tuple[int, ...], str, str]]
    frozen: int
    state_bytes: int
    hyper: dict[str, float]
    fallen_back: str | None = None
    program_hash: str | None = None
    compile_count: int = 0
    compile_seconds: float = 0.0
    cached: int = 0
    trace_seconds: float = 0.0
    paper: str | None = None
    quantized: str | None = None
    credit: str | None = None
    selected: list[str] = field(default_factory=list)
    count_full: Callable[[], tuple[int, int] | None] = field(default=lambda: None, repr=False)
    programs: dict[str, list[tuple[str, str]]] = field(default_factory=dict, repr=False)
    notes: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    estimate: Callable[[], Costs] | None = field(default=None, repr=False)
    costs_unknown: str | None = "no batch was seen yet"

    @functools.cached_property
    def costs(self) -> Costs | None:
        """The costs of a step on the last batch's sizes, worked out when first asked for (a second or two).

        None before the first batch, and where :attr:`costs_unknown` says why.
        """
        if self.estimate is None:
            return None
        try:
            found, self.costs_unknown = self.estimate(), None
        except ZOCaptureError as error:
            found, self.costs_unknown = None, str(error)
        return found

    @functools.cached_property
    def full_rows(self) -> tuple[int, int] | None:
        """The full rows of moving codes (at ±127), and all rows; None where no codes move. Counted on demand."""
        return self.count_full()

    @property
    def elements(self) -> int:
        """Number of tunable elements d."""
        return sum(count for _, count in self.blocks)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the programs' texts, ready for JSON.

        ``"costs"`` is :meth:`zowrap.analysis.costs.Costs.as_dict`, or None and ``"costs_unknown"`` says why.
        """
        costs = self.costs
        return {
            "engine": self.engine,
            "fallen_back": self.fallen_back,
            "program_hash": self.program_hash,
            "compile_count": self.compile_count,
            "compile_seconds": round(self.compile_seconds, 3),
            "cached": self.cached,
            "trace_seconds": round(self.trace_seconds, 3),
            "rule": self.rule,
            "paper": self.paper,
            "direction": self.direction,
            "forwards_per_step": self.forwards,
            "schedule": self.schedule,
            "schedule_why": self.schedule_why,
            "hyper": self.hyper,
            "quantized": self.quantized,
            "credit": self.credit,
            "full_rows": self.full_rows and self.full_rows[0],
            "elements": self.elements,
            "selected": self.selected,
            "frozen": self.frozen,
            "state_bytes": self.state_bytes,
            "blocks": [{"name": name, "elements": count} for name, count in self.blocks],
            "moves": [
                {"name": name, "shape": list(shape), "dtype": dtype, "rounding": rounding}
                for name, shape, dtype, rounding in self.moves
            ],
            "passes": self.notes,
            "costs": None if costs is None else costs.as_dict(),
            "costs_unknown": self.costs_unknown if costs is None else None,
        }

    def __str__(self) -> str:
        ready = f"{self.compile_count} regions, {self.cached} of them from the cache, ready in"
        compiled = (
            f", traced in {self.trace_seconds:.1f} s, {ready} {self.compile_seconds:.1f} s"
            if self.compile_count
            else ""
        )
        lines = [
            f"engine     {self.engine}{compiled}" + (f" (fell back: {self.fallen_back})" if self.fallen_back else ""),
            f"rule       {self.rule}, " + self._probes(),
            f"schedule   {self.schedule}: {self.schedule_why}",
            f"moves      {self.elements:,} elements in {len(self.moves)} tensors; {self.frozen:,} stay as they are",
            f"state      {self.state_bytes:,} bytes",
            f"blocks     {len(self.blocks)}: " + ", ".join(f"{name} ({count:,})" for name, count in self.blocks[:8]),
        ]
        if self.quantized is not None:
            full = f"; {self.full_rows[0]:,} of {self.full_rows[1]:,} rows are full" if self.full_rows else ""
            lines.insert(4, f"quantised  {self.quantized}{full}")
        if self.credit is not None:
            lines.insert(2, f"credit     {self.credit}")
        if len(self.blocks) > 8:
            lines[-1] += f", … {self.blocks[-1][0]} ({self.blocks[-1][1]:,})"
        lines += [f"selected   {each}" for each in self.selected]
        for name, shape, dtype, rounding in self.moves[:12]:
            lines.append(f"  {name}  {list(shape)}  {dtype}{'  ' + rounding if rounding != 'exact' else ''}")
        if len(self.moves) > 12:
            lines.append(f"  … and {len(self.moves) - 12} more")
        lines += _cost_lines(self.costs) if self.costs else []
        for program, notes in self.notes.items():
            lines.append(f"program    {program}")
            lines += [f"  {name:<16} {note}" for name, note in notes.items()]
        return "\n".join(lines)

    def _probes(self) -> str:
        if self.credit is not None:
            return "residual credit, no directions"
        return f"{self.forwards} forwards a step, {self.direction} directions, ε {self.hyper['eps']:g}"


def _cost_lines(costs: Costs) -> list[str]:
    """The costs as lines of text."""
    step, forwards, memory = costs.step, costs.forwards, costs.memory
    flops, moved = step.flops / max(forwards.flops, 1), step.bytes / max(forwards.bytes, 1)
    sizes = " × ".join(str(n) for n in next(iter(costs.sizes.values()), ()))
    return [
        f"a step     {step.flops:.3g} FLOPs, {flops:.2f} of two plain forwards', for a batch of {sizes}",
        f"           {format_bytes(step.bytes)} moved, {moved:.2f} of theirs: weights "
        f"{format_bytes(step.weight_bytes)}, activations {format_bytes(step.activation_bytes)}, update "
        f"{format_bytes(step.update_bytes)}; {step.noise:,.0f} random numbers",
        f"memory     {format_bytes(memory.peak)} at the peak: weights {format_bytes(memory.weights)}, state "
        f"{format_bytes(memory.state)}, scratch {format_bytes(memory.scratch)}, activations "
        f"{format_bytes(memory.transient)} (one forward: {format_bytes(costs.forward_transient)})",
    ]


def report(
    job: Job,
    engine: Engine,
    schedule: Schedule,
    values: Mapping[str, float],
    shapes: dict[str, Any] | None,
    estimate: Callable[[], Costs] | None = None,
    *,
    check_every: int,
) -> Report:
    """Collect the facts of a wrapped model; runs nothing.

    Args:
        values: the running ``lr``, ``eps`` and ``weight_decay``.
        shapes: the last batch, on the meta device.
        estimate: works out the costs; by default those of a step on a batch like the last one.
        check_every: with residual credit, steps between checks that a step descends.
    """
    if estimate is None and shapes is not None:
        estimate = functools.partial(_costs, job, engine, schedule, shapes)
    facts = engine.describe()
    credited = _credited(job, engine, shapes) if job.estimator.credit else None
    parameters = job.parameters if credited is None else [job.parameters[i] for i in credited]
    moving = {id(p.tensor) for p in parameters}
    blocks = [(block.name, job.count(b)) for b, block in enumerate(job.blocks)]
    if credited is not None:
        blocks = [(blocks[0][0], sum(p.tensor.numel() for p in parameters))]
    result = Report(
        engine=facts["engine"],
        rule=job.rule.describe(),
        direction=job.direction.name,
        forwards=len(job.points) + job.candidates,
        schedule=schedule.name,
        schedule_why=_EAGER if facts["engine"] == "eager" else schedule.why,
        blocks=blocks,
        moves=[
            (
                p.name,
                tuple(p.tensor.shape),
                str(p.tensor.dtype).removeprefix("torch."),
                _rounding(job, p),
            )
            for p in parameters
        ],
        frozen=sum(p.numel() for p in job.loss.model.parameters() if id(p) not in moving),
        state_bytes=job.state_bytes,
        hyper={name: values[name] for name in ("lr", "eps", "weight_decay")},
        fallen_back=facts.get("fallen_back"),
        program_hash=facts["program_hash"],
        compile_count=facts["compile_count"],
        compile_seconds=facts.get("compile_seconds", 0.0),
        cached=facts.get("cached", 0),
        trace_seconds=facts.get("trace_seconds", 0.0),
        quantized=None if job.quant_mode is None else modes.explain(job.quant_mode, job.parameters),
        credit=_describe_credit(check_every, credited is not None) if job.estimator.credit else None,
        count_full=functools.partial(modes.count_full_rows, job.parameters),
        selected=list(job.selected),
        paper=REGISTRY[job.rule.name].paper if job.rule.name in REGISTRY else None,
        estimate=estimate,
    )
    for name, program in facts.get("programs", {}).items():
        result.programs[name] = program.history
        result.notes[name] = program.notes
    return result


_CREDIT = (
    "forward-only, not zeroth-order: exact for what follows the residual stream and what writes to it last, biased for "
    "lower blocks, the more the lower"
)
_AT_FIRST = "of the weights below, those that write to the stream move, which the first batch shows"


def _describe_credit(check_every: int, seen: bool) -> str:
    checks = (
        f"{_CREDIT}; every {check_every} steps, two forwards check that a step descends" if check_every else _CREDIT
    )
    return checks if seen else f"{checks}; {_AT_FIRST}"


def _credited(job: Job, engine: Engine, shapes: dict[str, Any] | None) -> list[int] | None:
    """Indices of the parameters that get residual credit; None where no batch has shown it yet."""
    if shapes is None or (find := getattr(engine, "credited", None)) is None:
        return None
    try:
        return sorted(find(shapes))
    except ZOCaptureError:
        return None


def _rounding(job: Job, parameter: Parameter) -> str:
    if not parameter.codes and not is_16_bit(parameter.tensor):
        return "exact"
    if parameter.codes:
        return "stochastic rounding"
    text = "to the nearest, from a float32 master" if job.masters else "stochastic rounding"
    return text if job.second_point is None else f"{text}, along the direction evaluated"


def _costs(job: Job, engine: Engine, schedule: Schedule, batch: dict[str, Any]) -> Costs:
    from zowrap.analysis.costs import CostModel

    return CostModel(job, engine, schedule, batch).costs()
