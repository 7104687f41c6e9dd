"""``zowrap inspect``: will it fit, what would move, how, and at what cost. No weight is loaded and no step is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from zowrap.errors import ZOCaptureError, ZOError

from .console import quiet_libraries, result, say
from .eval import split_labels
from .options import Dtype, Head, Json, Labels, Memory, Plugin, Trust, option, takes

LENGTH = 256  # tokens of a row where --max-length does not say: a paragraph


@dataclasses.dataclass
class InspectOptions:
    model: Annotated[str, typer.Argument(help="A model directory, a run, or a hub name.", show_default=False)]
    rule: Annotated[str, option("--rule", "Update rule.")] = "meazo"
    direction: Annotated[str | None, option("--direction", "Law of the directions; by default the rule's own.")] = None
    queries: Annotated[int | None, option("--queries", "Directions per step; by default the rule's own.")] = None
    estimator: Annotated[str | None, option("--estimator", "central, forward or population.")] = None
    blocks: Annotated[list[str], option("--blocks", "'layer', or name patterns. Repeatable.")] = dataclasses.field(
        default_factory=list
    )
    trainable: Annotated[list[str], option("--trainable", "Name pattern of what moves. Repeatable.")] = (
        dataclasses.field(default_factory=list)
    )
    engine: Annotated[str | None, option("--engine", "compiled or eager.")] = None
    memory: Memory = "auto"
    task: Annotated[str | None, option("--task", "classification or lm; by default the checkpoint's own head.")] = None
    head: Head = "auto"
    labels: Labels = None
    batch_size: Annotated[int, option("--batch-size", "Rows of the batch that costs are of.")] = 16  # tune's
    max_length: Annotated[
        int | None, option("--max-length", f"Tokens of its rows; by default {LENGTH}, or what the model reads.")
    ] = None
    plugin: Plugin = dataclasses.field(default_factory=list)
    programs: Annotated[bool, option("--programs", "Print the programs of a step after each pass.")] = False
    html: Annotated[str | None, option("--html", "Write a picture of the step's program to this file.")] = None
    dtype: Dtype = None
    trust_remote_code: Trust = False
    json: Json = False


@takes(InspectOptions)
def inspect_model(context: typer.Context, options: InspectOptions) -> None:
    """Say whether a model can be tuned here, which parameters move, and what a step costs; its weights stay unread."""
    _check(options)
    quiet_libraries()
    from zowrap.report import report
    from zowrap.tasks import check_kind, choose_dtype, open_source

    if options.task is not None:
        check_kind(options.task)
    source = open_source(options.model, options.trust_remote_code, empty=True)
    dtype, why = choose_dtype(options.dtype, source)
    shapes, zm = _wrapped(options, source, dtype)
    estimator, problem = _estimator(zm, shapes)
    if estimator is None and (options.programs or options.html):
        raise ZOError(f"there is no program to {'print' if options.programs else 'draw'}: {problem}")
    plan = _plan(options, zm, estimator, problem)
    programs = [] if estimator is None else estimator.programs()
    facts = report(zm, plan.costs)
    facts.notes = {name: laid.program.notes for name, laid in programs}
    record: dict[str, Any] = {"model": options.model, "dtype": _name(dtype), **plan.record(), **facts.as_dict()}
    lines = [f"{options.model} in {_name(dtype)} ({why})", plan.sentence, *str(facts).splitlines()]
    if options.html:
        _draw(options, programs, lines)
    if options.programs:
        record["programs"] = {name: [list(pair) for pair in laid.program.history] for name, laid in programs}
        for name, laid in programs:
            for made_by, text in laid.program.history:
                lines += ["", f"# {name}, after {made_by}", text]
    result(record, options.json, lines)


def _check(options: InspectOptions) -> None:
    """Raise :class:`ZOError` for an option that cannot be used, before anything is imported."""
    if options.batch_size < 1:
        raise ZOError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.max_length is not None and options.max_length < 2:
        raise ZOError(f"--max-length must be at least 2, got {options.max_length}")
    if options.html is not None:
        file = Path(options.html)
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ZOError(f"--html {options.html} cannot be written: give a file in a folder that exists")


def _wrapped(options: InspectOptions, source: Any, dtype: Any) -> tuple[Any, Any]:
    """The model's shapes, and the model wrapped as ``tune`` would wrap it."""
    from zowrap.tasks.shapes import shapes
    from zowrap.wrap import zo_wrap

    window = source.window
    length = options.max_length or LENGTH
    if window is not None and length > window:
        if options.max_length:
            say(f"--max-length {length} is cut to the {window} tokens that the model reads")
        length = window
    found = shapes(source, dtype, options.task, options.batch_size, length, options.head, split_labels(options.labels))
    zm = zo_wrap(
        found.model,
        options.rule,
        direction=options.direction,
        queries=options.queries,
        estimator=options.estimator,
        blocks=blocks_of(options.blocks),
        trainable=options.trainable or found.trainable,
        loss_fn=found.loss_fn,
        engine=options.engine,
        memory=options.memory,
    )
    return found, zm


def blocks_of(values: list[str]) -> str | list[str] | None:
    """``--blocks`` as ``zo_wrap`` takes it: nothing, ``"layer"``, or a list of patterns."""
    if not values:
        return None
    return "layer" if values == ["layer"] else list(values)


def _estimator(zm: Any, shapes: Any) -> tuple[Any, str | None]:
    """What works out the costs, or why they cannot be had."""
    from zowrap.costs import Estimator

    if shapes.batch is None:
        return None, shapes.why_not
    try:
        estimator = Estimator(zm, shapes.batch)
        estimator.costs()
    except ZOCaptureError as error:
        return None, str(error)
    return estimator, None


@dataclasses.dataclass
class _Plan:
    """Whether it fits.

    Attributes:
        needed: predicted peak bytes; without costs the least that is needed whatever the batch.
        costs: works out the costs under the model's schedule.
    """

    needed: int
    free: int
    fits: bool
    sentence: str
    costs: Callable[[], Any]

    def record(self) -> dict[str, Any]:
        return {"fits": self.fits, "needed_bytes": self.needed, "free_bytes": self.free}


def _plan(options: InspectOptions, zm: Any, estimator: Any, problem: str | None) -> _Plan:
    """Let the model choose its schedule, and see whether that fits."""
    from zowrap.memory import fits, free_memory, in_words, what_helps

    free, found = free_memory(), None
    if estimator is None:
        needed, costs = _least(zm), _unknown(problem)
        of_what = f"without activations, which are not known: {problem}"
    else:
        zm._schedule.choose(estimator, free)
        costs = estimator.costs
        found = costs()
        needed = found.memory.peak
        rows, length = estimator.batch["input_ids"].shape
        of_what = f"{rows} × {length} tokens, {zm._schedule.name}"
    enough = fits(needed, free)
    verdict = "fits" if enough else "does not fit"
    sentence = f"{verdict}: needs {in_words(needed)}, {in_words(free)} free ({of_what})"
    if not enough:
        itemsize = max(p.tensor.element_size() for p in zm.parameters)
        sentence += f"; what would help: {', '.join(what_helps(found, options.batch_size, itemsize))}"
    return _Plan(needed, free, enough, sentence, costs)


def _least(zm: Any) -> int:
    """Weights, the rule's state, and the perturbed copy of what moves that the eager engine makes."""
    from zowrap.costs import weight_bytes

    moving = sum(p.tensor.numel() * p.tensor.element_size() for p in zm.parameters)
    return weight_bytes(zm.model) + zm._job.state_bytes + moving


def _unknown(problem: str | None) -> Callable[[], Any]:
    def costs() -> Any:
        raise ZOCaptureError(problem or "")

    return costs


def _draw(options: InspectOptions, programs: Any, facts: list[str]) -> None:
    """``--html``: the largest program of the step."""
    from zowrap.files import write_text
    from zowrap.view import page

    assert options.html is not None
    name, laid = max(programs, key=lambda program: len(program[1].program.graph.nodes))
    write_text(options.html, page(f"{options.model}, a step of {options.rule}: {name}", laid, facts))
    say(f"{options.html} written")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
