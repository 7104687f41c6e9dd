"""``zowrap inspect``: will it fit, what would move, how, and at what cost.

No weight is loaded and no step is run, except with ``--data``: the rounding of 8-bit activations shows in losses alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from zowrap import names
from zowrap.cli.checks import at_least, check_step_options, one_of
from zowrap.cli.console import begin, quiet_libraries, result, say
from zowrap.cli.options import SharedOptions, load_plugins, option, split_labels, takes
from zowrap.cli.paths import PATH
from zowrap.cli.scope import OWN, check_scope, list_asked
from zowrap.cli.spelling import spelled_for
from zowrap.cli.step import rule_options, step_values
from zowrap.cli.tasks import resolve_task, saved_task
from zowrap.errors import ZOCaptureError, ZOError
from zowrap.step.options import ENTRIES
from zowrap.storage.safetensors import check_directory
from zowrap.tasks.rows import check_source

LENGTH = 256  # tokens of a row where --max-length does not say: a paragraph


@dataclasses.dataclass(kw_only=True)
class InspectOptions(SharedOptions):
    LEFT_OUT: ClassVar = tuple(name for name, entry in ENTRIES.items() if not entry.costs)
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
    asked = list_asked(context, options)
    _check(options, asked)
    begin(options.model)
    quiet_libraries()
    load_plugins(options.plugin)
    from zowrap.model.inspect import report
    from zowrap.tasks.loading import choose_dtype, open_source
    from zowrap.tasks.rows import read_rows

    source = _open(options)
    dtype, why = choose_dtype(options.dtype, source)
    shapes, zm = _wrap_shapes(options, source, dtype)
    cost_model, problem = _cost_model(zm, shapes)
    if cost_model is None and (options.programs or options.html):
        raise ZOError(f"there is no program to {'print' if options.programs else 'draw'}: {problem}")
    plan = _plan(options, zm, cost_model, problem)
    programs = [] if cost_model is None else cost_model.programs()
    facts = report(zm.job, zm.engine, zm.schedule, zm.hyper, shapes.batch, plan.costs, check_every=zm.descent.every)
    facts.notes = {name: laid.program.notes for name, laid in programs}
    record: dict[str, Any] = {"model": options.model, "dtype": _name(dtype), **plan.record(), **facts.as_dict()}
    record["eps_why"], record["noise_floor"] = _why_eps(options, zm), None
    lines = [f"{options.model} in {_name(dtype)} ({why})", plan.sentence, *str(facts).splitlines()]
    if not zm.job.estimator.credit:
        lines.append(f"eps        {zm.eps:g} ({record['eps_why']})")
    rounds = zm.job.quant_mode is not None and zm.job.quant_mode.rounds
    if options.data is not None and not rounds:
        read_rows(options.data, default_split="train")  # a name that is wrong is wrong here, too
        lines.append("floor      none: no layer rounds its activations to 8 bit")
    elif options.data is not None:
        found = _floor(options, asked, open_source(options.model, options.trust_remote_code), dtype)
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


def _check(options: InspectOptions, asked: frozenset[str]) -> None:
    """Raise :class:`ZOError` for an option that cannot be used, before anything is opened or torch imported."""
    one_of("--task", options.task, names.TASKS)
    check_step_options(options)
    at_least(options, max_length=2)
    # Without a task the class that the checkpoint names is inspected, with its own loss.
    check_scope("inspect", asked, task=options.task or OWN, form=None if options.head == "auto" else options.head)
    if options.html is not None:
        file = Path(options.html)
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ZOError(f"--html {options.html} cannot be written: give a file in a folder that exists")
    if options.data is not None:
        check_source(options.data)
    check_directory(options.model, weights=False)


def _open(options: InspectOptions) -> Any:
    """The model's configuration, and how its weights would be quantised."""
    from zowrap.quant.schemes import bitsandbytes_options
    from zowrap.storage.safetensors import adapters_base
    from zowrap.tasks.loading import open_source

    source = open_source(options.model, options.trust_remote_code, empty=True)
    base = adapters_base(source.name)
    if base is not None:
        raise ZOError(f"{options.model} holds adapters: inspect what they stand on, zowrap inspect {base} --use-peft")
    source.quantization = bitsandbytes_options(dataclasses.asdict(options))
    return source


def _wrap_shapes(options: InspectOptions, source: Any, dtype: Any) -> tuple[Any, Any]:
    """The model's shapes, and the model wrapped as ``tune`` would wrap it."""
    from zowrap.tasks.shapes import build_shapes

    window = source.window
    length = options.max_length or LENGTH
    if window is not None and length > window:
        if options.max_length:
            say(f"--max-length {length} is cut to the {window} tokens that the model reads")
        length = window
    found = build_shapes(
        source, dtype, options.task, options.batch_size, length, options.head, split_labels(options.labels)
    )
    return found, _wrap(options, found.model, found.trainable, found.loss_fn)


def _wrap(options: InspectOptions, model: Any, trainable: Any, loss_fn: Any) -> Any:
    """Put adapters on a model where they are to move, and wrap it, as ``tune`` does."""
    from zowrap import rules
    from zowrap.quant import modes
    from zowrap.wrap import zo_wrap

    with spelled_for(options):
        mode = modes.choose_from_options(model, dataclasses.asdict(options), seed=0)
        if mode is not None or options.use_peft:
            trainable = None
        rule = rules.get(options.rule, **rule_options(options))
        values = {**step_values(options), "rule": rule, "trainable": options.trainable or trainable}
        return zo_wrap(model, loss_fn=loss_fn, **values)


def _why_eps(options: InspectOptions, zm: Any) -> str:
    """The origin of ε, in words."""
    if options.eps is not None:
        return "as asked"
    return "the default" if zm.quantized is None else f"the default of {zm.quantized}"


def _floor(options: InspectOptions, asked: frozenset[str], source: Any, dtype: Any) -> Any:
    """Load the weights and measure on a batch of ``--data`` how much of a difference of losses is rounding."""
    from zowrap.calibration.noise_floor import noise_floor
    from zowrap.quant.schemes import bitsandbytes_options
    from zowrap.tasks.batches import iterate_batches
    from zowrap.tasks.resolve import restore_task
    from zowrap.tasks.rows import read_rows

    assert options.data is not None
    rows, saved = read_rows(options.data, default_split="train"), saved_task(options.model)
    if options.task is None and saved is not None:
        task = restore_task(saved)
    else:
        kind = options.task or "classification"
        task, why = resolve_task("inspect", dataclasses.replace(options, task=kind), asked, rows, source)
        say(why)
    task.check(rows)
    examples = task.examples(rows[: options.batch_size], source)
    if not len(examples):
        raise ZOError(f"none of the first {options.batch_size} rows of {options.data} has anything to learn from")
    source.quantization = bitsandbytes_options(dataclasses.asdict(options))
    model = task.build(source, dtype)
    # Compiling takes longer than the few evaluations do.
    eager = dataclasses.replace(options, engine="eager")  # type: ignore[call-arg]  # of a class that mypy cannot see
    zm = _wrap(eager, model, task.default_trainable(model), task.loss_fn)
    (batch,) = iterate_batches(examples, task.collator(source), options.batch_size)
    return noise_floor(zm, batch)


def _floor_line(found: Any) -> str:
    where = "eps is below it:" if found.hidden else f"{found.floor:.2g},"
    return (
        f"floor      {where} rounding moves a difference of two losses by {found.rounding:.2g}; "
        f"signs agree with those at eps {found.against:.2g} on {found.agreement:.0%}"
    )


def _cost_model(zm: Any, shapes: Any) -> tuple[Any, str | None]:
    """The cost model, or the reason why there is none."""
    from zowrap.analysis.costs import CostModel

    if shapes.batch is None:
        return None, shapes.why_not
    try:
        cost_model = CostModel(zm.job, zm.engine, zm.schedule, shapes.batch)
        cost_model.costs()
    except ZOCaptureError as error:
        return None, str(error)
    return cost_model, None


@dataclasses.dataclass
class _Plan:
    """The answer to whether the run fits.

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


def _plan(options: InspectOptions, zm: Any, cost_model: Any, problem: str | None) -> _Plan:
    """Let the model choose its schedule, and see whether that fits."""
    from zowrap.analysis.costs import what_helps
    from zowrap.machine import fits, format_bytes, free_memory

    free, found = free_memory(), None
    if cost_model is None:
        needed, costs = _least_bytes(zm), _unknown(problem)
        of_what = f"without activations, which are not known: {problem}"
    else:
        zm.schedule.choose(cost_model, free)
        costs = cost_model.costs
        found = costs()
        needed = found.memory.peak
        rows, length = cost_model.batch["input_ids"].shape
        of_what = f"{rows} × {length} tokens, {zm.schedule.name}"
    enough = fits(needed, free)
    verdict = "fits" if enough else "does not fit"
    sentence = f"{verdict}: needs {format_bytes(needed)}, {format_bytes(free)} free ({of_what})"
    if not enough:
        itemsize = max(p.tensor.element_size() for p in zm.parameters)
        sentence += f"; what would help: {', '.join(what_helps(found, options.batch_size, itemsize))}"
    return _Plan(needed, free, enough, sentence, costs)


def _least_bytes(zm: Any) -> int:
    """Weights, the rule's state, and the perturbed copy of what moves that the eager engine makes."""
    from zowrap.step.parameters import weight_bytes

    moving = sum(p.tensor.numel() * p.tensor.element_size() for p in zm.parameters)
    return weight_bytes(zm.model) + zm.job.state_bytes + moving


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
