"""``zowrap inspect``: will it fit, what would move, how, and at what cost.

No weight is loaded and no step is run, except with ``--data``: the rounding of 8-bit activations shows in losses alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from zowrap import names
from zowrap.cli.checks import at_least, check_step_options, one_of, rule_options, users_words
from zowrap.cli.console import begin, quiet_libraries, result, say
from zowrap.cli.options import StepOptions, load_plugins, option, split_labels, takes
from zowrap.cli.paths import PATH
from zowrap.cli.tasks import resolve_task, saved_task
from zowrap.errors import ZOCaptureError, ZOError
from zowrap.storage.safetensors import check_directory
from zowrap.tasks.rows import check_source

LENGTH = 256  # tokens of a row where --max-length does not say: a paragraph


@dataclasses.dataclass(kw_only=True)
class InspectOptions(StepOptions):
    model: Annotated[str, typer.Argument(help="A model directory, a run, or a hub name.", show_default=False), PATH]
    task: Annotated[str | None, option("--task", "classification or lm; by default the checkpoint's own head.")] = None
    max_length: Annotated[
        int | None, option("--max-length", f"Tokens of a row; by default {LENGTH}, or what the model reads.")
    ] = None
    data: Annotated[
        str | None,
        option("--data", "Load the model and measure on rows of this file how small --eps may be.", "Data"),
        PATH,
    ] = None
    programs: Annotated[bool, option("--programs", "Print the programs of a step after each pass.")] = False
    html: Annotated[str | None, option("--html", "Write a picture of the step's program to this file."), PATH] = None


@takes(InspectOptions)
def inspect_model(context: typer.Context, options: InspectOptions) -> None:
    """Say whether a model can be tuned here, what moves, and what a step costs; weights are read with --data alone."""
    _check(options)
    begin(options.model)
    quiet_libraries()
    load_plugins(options.plugin)
    from zowrap.model.inspect import report
    from zowrap.tasks.loading import choose_dtype, open_source
    from zowrap.tasks.rows import read_rows

    source = _open(options)
    dtype, why = choose_dtype(options.dtype, source)
    shapes, zm = _wrapped(options, source, dtype)
    estimator, problem = _estimator(zm, shapes)
    if estimator is None and (options.programs or options.html):
        raise ZOError(f"there is no program to {'print' if options.programs else 'draw'}: {problem}")
    plan = _plan(options, zm, estimator, problem)
    programs = [] if estimator is None else estimator.programs()
    facts = report(zm._job, zm._engine, zm._schedule, zm._values, None, plan.costs)
    facts.notes = {name: laid.program.notes for name, laid in programs}
    record: dict[str, Any] = {"model": options.model, "dtype": _name(dtype), **plan.record(), **facts.as_dict()}
    record["eps_why"], record["noise_floor"] = _why_eps(options, zm), None
    lines = [f"{options.model} in {_name(dtype)} ({why})", plan.sentence, *str(facts).splitlines()]
    lines.append(f"eps        {zm.eps:g} ({record['eps_why']})")
    rounds = zm._job.way is not None and zm._job.way.rounds
    if options.data is not None and not rounds:
        read_rows(options.data, default_split="train")  # a name that is wrong is wrong here, too
        lines.append("floor      none: no layer rounds its activations to 8 bit")
    elif options.data is not None:
        found = _floor(options, open_source(options.model, options.trust_remote_code), dtype)
        record["noise_floor"] = found.record()
        lines.append(_floor_line(found))
        if found.hidden:
            say(f"--eps {found.eps:g} is below the floor: the rounding of activations hides what the loss does")
    elif rounds:
        lines.append("floor      activations are rounded to 8 bit: --data FILE measures how small eps may be")
    if options.html:
        _draw(options, programs, lines)
    if options.programs:
        record["programs"] = {name: [list(pair) for pair in laid.program.history] for name, laid in programs}
        for name, laid in programs:
            for made_by, text in laid.program.history:
                lines += ["", f"# {name}, after {made_by}", text]
    result(record, options.json, lines)


def _check(options: InspectOptions) -> None:
    """Raise :class:`ZOError` for an option that cannot be used, before anything is opened or torch imported."""
    one_of("--task", options.task, names.TASKS)
    check_step_options(options)
    at_least(options, max_length=2)
    if options.html is not None:
        file = Path(options.html)
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ZOError(f"--html {options.html} cannot be written: give a file in a folder that exists")
    if options.data is not None:
        check_source(options.data)
    check_directory(options.model, weights=False)


def _open(options: InspectOptions) -> Any:
    """The model's configuration, and how its weights would be quantised."""
    from zowrap.quant.schemes import quantization
    from zowrap.storage.safetensors import adapters_base
    from zowrap.tasks.loading import open_source

    base = adapters_base(options.model)
    if base is not None:
        raise ZOError(f"{options.model} holds adapters: inspect what they stand on, zowrap inspect {base} --use-peft")
    source = open_source(options.model, options.trust_remote_code, empty=True)
    source.quantization = quantization(dataclasses.asdict(options))
    return source


def _wrapped(options: InspectOptions, source: Any, dtype: Any) -> tuple[Any, Any]:
    """The model's shapes, and the model wrapped as ``tune`` would wrap it."""
    from zowrap.tasks.shapes import shapes

    window = source.window
    length = options.max_length or LENGTH
    if window is not None and length > window:
        if options.max_length:
            say(f"--max-length {length} is cut to the {window} tokens that the model reads")
        length = window
    found = shapes(source, dtype, options.task, options.batch_size, length, options.head, split_labels(options.labels))
    return found, _wrap(options, found.model, found.trainable, found.loss_fn)


def _wrap(options: InspectOptions, model: Any, trainable: Any, loss_fn: Any) -> Any:
    """Put adapters on a model where they are to move, and wrap it, as ``tune`` does."""
    from zowrap.quant import modes
    from zowrap.rules.registry import get
    from zowrap.wrap import zo_wrap

    with users_words(options):
        way = modes.from_options(model, dataclasses.asdict(options), seed=0)
        if way is not None or options.use_peft:
            trainable = None
        return zo_wrap(
            model,
            get(options.rule, **rule_options(options)),
            eps=options.eps,
            direction=options.direction,
            queries=options.queries,
            estimator=options.estimator,
            blocks=blocks_of(options.blocks),
            block_order=options.block_order,
            trainable=options.trainable or trainable,
            loss_fn=loss_fn,
            engine=options.engine,
            weight_decay=options.weight_decay,
            quantized=options.quantized,
            memory=options.memory,
            masters=options.masters,
            along=options.along,
        )


def _why_eps(options: InspectOptions, zm: Any) -> str:
    """Where ε comes from, in words."""
    if options.eps is not None:
        return "as asked"
    return "the default" if zm.quantized is None else f"the default of {zm.quantized}"


def _floor(options: InspectOptions, source: Any, dtype: Any) -> Any:
    """Load the weights and measure on a batch of ``--data`` how much of a difference of losses is rounding."""
    from zowrap.calibration.noise_floor import noise_floor
    from zowrap.quant.schemes import quantization
    from zowrap.tasks.batches import batches
    from zowrap.tasks.resolve import from_record
    from zowrap.tasks.rows import read_rows

    assert options.data is not None
    rows, saved = read_rows(options.data, default_split="train"), saved_task(options.model)
    if options.task is None and saved is not None:
        task = from_record(saved)
    else:
        kind = options.task or "classification"
        task, why = resolve_task(dataclasses.replace(options, task=kind), rows, source)
        say(why)
    task.check(rows)
    examples = task.examples(rows[: options.batch_size], source)
    if not len(examples):
        raise ZOError(f"none of the first {options.batch_size} rows of {options.data} has anything to learn from")
    source.quantization = quantization(dataclasses.asdict(options))
    model = task.build(source, dtype)
    # Compiling takes longer than the few evaluations do.
    eager = dataclasses.replace(options, engine="eager")  # type: ignore[call-arg]  # of a class that mypy cannot see
    zm = _wrap(eager, model, task.default_trainable(model), task.loss_fn)
    (batch,) = batches(examples, task.collator(source), options.batch_size)
    return noise_floor(zm, batch)


def _floor_line(found: Any) -> str:
    where = "eps is below it:" if found.hidden else f"{found.floor:.2g},"
    return (
        f"floor      {where} rounding moves a difference of two losses by {found.rounding:.2g}; "
        f"signs agree with those at eps {found.against:.2g} on {found.agreement:.0%}"
    )


def blocks_of(values: list[str]) -> str | list[str] | None:
    """``--blocks`` as ``zo_wrap`` takes it: nothing, ``"layer"``, or a list of patterns."""
    if not values:
        return None
    return "layer" if values == ["layer"] else list(values)


def _estimator(zm: Any, shapes: Any) -> tuple[Any, str | None]:
    """What works out the costs, or why they cannot be had."""
    from zowrap.analysis.costs import CostModel

    if shapes.batch is None:
        return None, shapes.why_not
    try:
        estimator = CostModel(zm._job, zm._engine, zm._schedule, shapes.batch)
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
    from zowrap.analysis.costs import what_helps
    from zowrap.machine import fits, free_memory, in_words

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
    from zowrap.step.parameters import weight_bytes

    moving = sum(p.tensor.numel() * p.tensor.element_size() for p in zm.parameters)
    return weight_bytes(zm.model) + zm._job.state_bytes + moving


def _unknown(problem: str | None) -> Callable[[], Any]:
    def costs() -> Any:
        raise ZOCaptureError(problem or "")

    return costs


def _draw(options: InspectOptions, programs: Any, facts: list[str]) -> None:
    """``--html``: the largest program of the step."""
    from zowrap.analysis.html import page
    from zowrap.storage.atomic import write_text

    assert options.html is not None
    name, laid = max(programs, key=lambda program: len(program[1].program.graph.nodes))
    write_text(options.html, page(f"{options.model}, a step of {options.rule}: {name}", laid, facts))
    say(f"{options.html} written")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
