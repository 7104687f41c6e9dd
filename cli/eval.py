"""``zowrap eval``: loss and accuracy of a run or a model on a data file."""

from __future__ import annotations

import dataclasses
import json as json_lib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zowrap import names
from zowrap.cli.checks import at_least, one_of
from zowrap.cli.console import begin, quiet_libraries, result, say
from zowrap.cli.options import (
    Dtype,
    EndOfText,
    Head,
    Json,
    LabelColumn,
    Labels,
    MaxLength,
    PairColumn,
    TaskKind,
    Template,
    TextColumn,
    Trust,
    given,
    option,
    split_labels,
    takes,
)
from zowrap.cli.paths import PATH
from zowrap.cli.scope import check_columns, check_scope, list_asked
from zowrap.cli.summary import spread
from zowrap.cli.tasks import check_task_scope, resolve_task, saved_task, say_counts, say_other_adapters
from zowrap.errors import ZOError
from zowrap.storage.atomic import is_same_place
from zowrap.storage.folder import RunFolder
from zowrap.storage.safetensors import adapter_file, check_directory, weight_files
from zowrap.tasks.rows import check_source

if TYPE_CHECKING:
    from zowrap.loss.evaluation import Evaluation


@dataclasses.dataclass
class EvalOptions:
    model: Annotated[str, typer.Argument(help="A run of zowrap tune, a model directory, or a hub name."), PATH]
    task: TaskKind = "classification"
    data: Annotated[
        str | None, option("--data", "What to evaluate: a file, or name[:split] of the hub.", "Data"), PATH
    ] = None
    predictions: Annotated[str | None, option("--predictions", "Write one line per row to this .jsonl file."), PATH] = (
        None
    )
    # 32 rows of ordinary text fit beside any model that can be tuned with 16.
    batch_size: Annotated[int, option("--batch-size", "Examples per forward pass.")] = 32
    max_eval_examples: Annotated[int | None, option("--max-eval-examples", "A fixed random part of the data.")] = None
    head: Head = "auto"
    labels: Labels = None
    template: Template = None
    text_column: TextColumn = "text"
    text_pair_column: PairColumn = None
    label_column: LabelColumn = "label"
    max_length: MaxLength = None
    end_of_text: EndOfText = False
    dtype: Dtype = None
    trust_remote_code: Trust = False
    json: Json = False


@takes(EvalOptions)
def evaluate(context: typer.Context, options: EvalOptions) -> None:
    """Measure loss and accuracy. A run of zowrap tune needs no option but --data."""
    asked = list_asked(context, options)
    saved = _check(context, options, asked)
    assert options.data is not None
    begin(options.model, options.data)
    quiet_libraries()
    from zowrap.quant.lowering import lower
    from zowrap.storage.base_options import read_base_options
    from zowrap.tasks.loading import choose_dtype, open_source
    from zowrap.tasks.rows import read_rows, sample

    rows = sample(read_rows(options.data, default_split="test"), options.max_eval_examples)
    source = open_source(options.model, options.trust_remote_code)
    source.complete = True
    task, why = _task(context, options, asked, saved, rows, source)
    task.check(rows)
    say(why)
    say_other_adapters(source.name)
    # A run is measured as it was tuned: in its own dtype, and adapters on the base as it was loaded for them.
    base = read_base_options(source.name) if adapter_file(source.name).is_file() else {}
    source.quantization = base.get("quantization")
    dtype, reason = choose_dtype(options.dtype or base.get("dtype") or ("auto" if saved else None), source)
    examples = task.examples(rows, source)
    say_counts(examples, task.max_length)
    if not len(examples):
        raise ZOError(f"{options.data}: no row has anything to predict")
    model = task.build(source, dtype)
    # The same outputs, of more shapes: on some processors the library's 4-bit layers want a multiple of 32 rows.
    lower(model, forward_only=True)
    say(f"{dtype}".removeprefix("torch.") + f" ({reason})")
    record = measure(model, task, examples, source, options.batch_size, options.predictions)
    accuracy = f"accuracy {record['accuracy']:.4f}{spread(record['accuracy_interval'])}"
    result(record, options.json, [f"loss {record['loss']:.4f}, {accuracy}, {record['examples']} examples"])


def _check_predictions(options: EvalOptions) -> None:
    """Raise :class:`ZOError` where ``--predictions`` would replace what is read: the data, or a file of the model's."""
    if options.predictions is None:
        return
    file = Path(options.predictions)
    if file.is_dir():
        raise ZOError(f"--predictions {file} is a directory: give the name of a file")
    inside = file.exists() and is_same_place(file.parent, options.model)
    if inside or (options.data is not None and is_same_place(file, options.data)):
        raise ZOError(f"--predictions {file} would replace a file that is read here: give the name of a new one")


def _check(context: typer.Context, options: EvalOptions, asked: frozenset[str]) -> dict[str, Any] | None:
    """The task of a run, None of another model.

    Raises:
        ZOError: an option that is seen to be wrong without torch.
    """
    if options.data is None:
        raise ZOError("what is to be evaluated? give --data FILE")
    at_least(options, batch_size=1, max_eval_examples=1, max_length=2)
    one_of("--task", options.task, names.TASKS)
    one_of("--head", options.head, (*names.FORMS, "auto"))
    one_of("--dtype", options.dtype, (*names.DTYPES, "auto"))
    split_labels(options.labels)
    check_source(options.data)
    saved = saved_task(options.model)
    if saved is not None:
        _check_saved(context, options, saved)
        check_task_scope("eval", asked, saved)
        check_columns(asked, options.template or saved.get("template"))
        _check_finished(options.model)
    else:
        form = None if options.head == "auto" else options.head
        check_scope("eval", asked, task=options.task, form=form)
    check_directory(options.model, whole=False)
    _check_predictions(options)
    return saved


def _check_saved(context: typer.Context, options: EvalOptions, saved: dict[str, Any]) -> None:
    """Raise :class:`ZOError` for an option that a run has settled."""
    if given(context, "task") and options.task != saved.get("kind"):
        raise ZOError(f"{options.model} was tuned for {saved.get('kind')}, not for --task {options.task}")
    for name in ("head", "labels"):
        if given(context, name):
            raise ZOError(f"{options.model} is a run and keeps its own --{name}: leave it out")


def _check_finished(model: str) -> None:
    there = bool(weight_files(model))
    if there:
        say_failure(model)
        return
    reason = RunFolder(model).failure()
    if reason:
        raise ZOError(f"{model} holds no tuned model, because its run failed: {reason}")
    raise ZOError(f"{model} holds no finished model yet: go on with zowrap tune --resume --out {model}")


def say_failure(folder: str | Path) -> None:
    """Say of a run that failed which model its folder holds."""
    run = RunFolder(folder)
    reason = run.failure()
    if reason:
        step = run.status().get("best_step")
        held = "the model from before" if step is None else f"the best model from before, of step {step}"
        say(f"the run in {folder} failed: {reason}; its folder holds {held}")


# What a run leaves open: the option, and its field in the record of the task.
_FIELDS = {
    "text_column": "text_column",
    "text_pair_column": "pair_column",
    "label_column": "label_column",
    "template": "template",
    "end_of_text": "end_of_text",
}


def _task(
    context: typer.Context,
    options: EvalOptions,
    asked: frozenset[str],
    saved: dict[str, Any] | None,
    rows: Any,
    source: Any,
) -> Any:
    """The run's own task with what the user asks otherwise, or one resolved from the options."""
    from zowrap.tasks.resolve import limit_length, restore_task, window_of

    if saved is None:
        return resolve_task("eval", options, asked, rows, source, keep_head=True)
    changes = {there: getattr(options, name) for name, there in _FIELDS.items() if given(context, name)}
    if options.max_length is not None:
        changes["max_length"] = limit_length(options.max_length, window_of(saved.get("form"), source))
    return restore_task({**saved, **changes}), f"{saved.get('kind')} as {options.model} was tuned"


def measure(
    model: Any, task: Any, examples: Any, source: Any, batch_size: int, predictions: str | None = None
) -> dict[str, Any]:
    """Loss and accuracy, weighted by examples or label tokens as in training, and how sure the accuracy is."""
    import torch

    from zowrap.loss.evaluation import measure_certainty
    from zowrap.storage.atomic import write_text

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines: list[str] = []

    def metrics(output: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if predictions is not None:
            for record in task.predictions(output, batch):
                lines.append(json_lib.dumps({"row": examples.rows[len(lines)], **record}, ensure_ascii=False))
        return task.metrics(output, batch)

    found = run_over(model.to(device), task, examples, source, batch_size, device, metrics)
    if predictions is not None:
        write_text(predictions, "\n".join(lines) + "\n")
    means, interval = found.means(), measure_certainty(found.rows())["accuracy"]["interval"]
    record = {"loss": means["loss"], "accuracy": means["accuracy"], "accuracy_interval": interval}
    broken = found.find_broken_rows()
    if broken:
        first = f"the first is row {broken[0]} (counted from 0)"
        say(f"{len(broken)} of {found.examples} rows have no finite loss, {first}, nor has their mean")
        record["rows_without_loss"] = len(broken)
    return {**record, "examples": found.examples}


def run_over(
    model: Any, task: Any, examples: Any, source: Any, batch_size: int, device: Any, metrics: Any
) -> Evaluation:
    """Evaluate a model that is on ``device`` over tokenised rows."""
    from zowrap.loss.evaluation import run_evaluation
    from zowrap.tasks.batches import iterate_batches

    on_device = (
        {name: value.to(device) for name, value in batch.items()}
        for batch in iterate_batches(examples, task.collator(source), batch_size)
    )
    return run_evaluation(model, on_device, task.loss_fn, metrics)
