"""The options of the commands: each a line of a dataclass, from which typer's signature is made.

Those of a step come from :class:`zowrap.step.options.StepOptions`. The dataclasses serve the command line, ``--config``
files, ``--resume`` and the configuration that a run saves.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from zowrap.cli.config import apply
from zowrap.cli.paths import PATH, _is_path, expand
from zowrap.errors import ZOError
from zowrap.step.options import ENTRIES, StepOptions


def takes(options: type) -> Callable[[Callable[[typer.Context, Any], Any]], Callable[..., Any]]:
    """Make a command of ``function(context, options)``: its parameters are the fields of the dataclass."""

    def decorate(function: Callable[[typer.Context, Any], Any]) -> Callable[..., Any]:
        def command(context: typer.Context, **values: Any) -> Any:
            values.update({name: expand(values[name]) for name in paths})
            values.update({name: values[name] or None for name in ENTRIES if values.get(name) == []})
            return function(context, options(**values))

        hints = typer_annotations(options)
        fields = [field for field in dataclasses.fields(options) if field.name in hints]
        paths = [name for name, hint in hints.items() if _is_path(hint)]
        parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        for field in fields:
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else []
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
                )
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {"context": typer.Context, **hints}
        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        return command

    return decorate


def typer_annotations(options: type) -> dict[str, Any]:
    """The annotation for typer of each field that the command takes, by name.

    A field of the table of step options says it there; the command's ``LEFT_OUT`` are those that it does not take.
    """
    hints = get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        entry = ENTRIES.get(field.name)
        if entry is not None:
            text = option(f"--{field.name.replace('_', '-')}", entry.help, entry.group)
            found[field.name] = Annotated[hints[field.name], text]
        else:
            found[field.name] = hints[field.name]
    return {name: hint for name, hint in found.items() if name not in getattr(options, "LEFT_OUT", ())}


def load_plugins(named: list[str]) -> None:
    """Import what ``--plugin`` names, once everything that can be wrong without it is checked."""
    if named:
        from zowrap.rules import plugins

        plugins.import_plugins(named)


def split_labels(labels: str | None) -> list[str] | None:
    """``"negative, positive"`` → ``["negative", "positive"]``."""
    if labels is None:
        return None
    names = [name.strip() for name in labels.split(",")]
    if not all(names):
        raise ZOError(f"--labels {labels!r} has an empty name")
    return names


def given(context: typer.Context, name: str) -> bool:
    """Whether the user set this option, on the command line or in a ``--config`` file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def option(names: str, text: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names.split(), help=text, rich_help_panel=panel, **more)


# Options that several commands have.
Json = Annotated[bool, option("--json", "Print one JSON object on stdout; everything else goes to stderr.")]
Plugin = Annotated[
    list[str], option("--plugin", "Python file or module that registers update rules of your own. Repeatable."), PATH
]
TaskKind = Annotated[str, option("--task", "classification or lm.", "Data")]
Head = Annotated[
    str,
    option(
        "--head", "Form of classification: auto, sequence, words (causal LMs), sentence or vectors (encoders)", "Data"
    ),
]
Labels = Annotated[
    str | None, option("--labels", "Label names, comma-separated, in the order that numbers them.", "Data")
]
Template = Annotated[str | None, option("--template", "How a row becomes text, e.g. '{text} It was {label}'.", "Data")]
TextColumn = Annotated[str, option("--text-column", "Column of the text.", "Data")]
PairColumn = Annotated[
    str | None,
    option("--text-pair-column", "Column of a second text, for a head that was trained on pairs of texts.", "Data"),
]
LabelColumn = Annotated[str, option("--label-column", "Column of the label.", "Data")]
MaxLength = Annotated[
    int | None, option("--max-length", "Most tokens of a row; by default what the model reads.", "Data")
]
EndOfText = Annotated[
    bool, option("--end-of-text", "lm: close plain text with the end-of-text token, as completions are.", "Data")
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype", "float32, bfloat16, float16 or auto (the checkpoint's). Default: float32 where it fits.", "Model"
    ),
]
Trust = Annotated[bool, option("--trust-remote-code", "Run code that the model's repository brings.", "Model")]


@dataclasses.dataclass
class SharedOptions(StepOptions):
    """The options that ``tune`` and ``inspect`` share: all that change what moves or what a step costs."""

    # A command line has no unions.
    lr: str | None = None  # type: ignore[assignment]
    rule_option: Annotated[
        list[str], option("--rule-option", "Hyper-parameter of the rule, name=value. Repeatable.", "Zeroth order")
    ] = dataclasses.field(default_factory=list)
    batch_size: Annotated[int, option("--batch-size", "Examples per forward pass.", "Training")] = 16
    head: Head = "auto"
    labels: Labels = None
    template: Template = None
    text_column: TextColumn = "text"
    text_pair_column: PairColumn = None
    label_column: LabelColumn = "label"
    end_of_text: EndOfText = False
    dtype: Dtype = None
    load_in_8bit: Annotated[bool, option("--load-in-8bit", "Quantise the weights to 8 bit on loading.", "Model")] = (
        False
    )
    load_in_4bit: Annotated[bool, option("--load-in-4bit", "Quantise the weights to 4 bit (nf4).", "Model")] = False
    use_peft: Annotated[bool, option("--use-peft", "Put LoRA adapters on the model: they alone move.", "Model")] = False
    lora_r: Annotated[int, option("--lora-r", "Rank of the adapters.", "Model")] = 8
    lora_alpha: Annotated[int, option("--lora-alpha", "Scale of the adapters, over their rank.", "Model")] = 16
    lora_target_modules: Annotated[
        list[str],
        option(
            "--lora-target-modules",
            "Names of the layers that get one, with commas or repeated; by default all linear ones.",
            "Model",
        ),
    ] = dataclasses.field(default_factory=list)
    trust_remote_code: Trust = False
    plugin: Plugin = dataclasses.field(default_factory=list)
    json: Json = False


@dataclasses.dataclass
class TuneOptions(SharedOptions):
    """Everything ``zowrap tune`` takes. Defaults that are None are resolved from the model or the rule."""

    model: Annotated[str | None, typer.Argument(help="Model directory or hub name.", show_default=False), PATH] = None
    task: TaskKind = "classification"
    data: Annotated[
        str | None,
        option("--data", "Training data: .jsonl, .csv, .parquet, or name[:split] of the hub.", "Data"),
        PATH,
    ] = None
    eval_data: Annotated[
        str | None, option("--eval-data", "Data that measures progress and picks the best model.", "Data"), PATH
    ] = None
    test_data: Annotated[
        str | None,
        option("--test-data", "Data that chooses nothing: the untuned and the best model are measured on it.", "Data"),
        PATH,
    ] = None
    out: Annotated[str | None, option("--out", "Directory of the run; it loads with from_pretrained."), PATH] = None
    # auto, because no default suits every model. A run keeps the number that was chosen.
    lr: str = "auto"  # type: ignore[assignment]
    # 600 steps of 16: the smallest run that moved a pretrained encoder by ten points in our measurements.
    steps: Annotated[int, option("--steps", "Number of steps.", "Training")] = 600
    grad_accum: Annotated[int, option("--grad-accum", "Micro-batches per step, under one direction.", "Training")] = 1
    # None: constant; linear with residual credit, whose first steps are too large for the last ones.
    lr_schedule: Annotated[
        str | None,
        option("--lr-schedule", "constant, linear or cosine; by default constant, linear with residual.", "Training"),
    ] = None
    warmup_steps: Annotated[int, option("--warmup-steps", "Steps over which the rate rises from 0.", "Training")] = 0
    eval_every: Annotated[
        int | None, option("--eval-every", "Steps between evaluations; by default a tenth of the run.", "Training")
    ] = None
    eval_batch_size: Annotated[
        int | None, option("--eval-batch-size", "Examples per batch of an evaluation.", "Training")
    ] = None
    max_eval_examples: Annotated[
        int | None, option("--max-eval-examples", "Evaluate on a fixed random part of the data.", "Training")
    ] = None
    save_every: Annotated[
        int | None, option("--save-every", "Steps between checkpoints; the journal fills the gaps.", "Training")
    ] = None
    save_total_limit: Annotated[int, option("--save-total-limit", "Checkpoints kept, and the best.", "Training")] = 1
    report_to: Annotated[
        list[str], option("--report-to", "tensorboard, wandb, … as in transformers. Repeatable.", "Training")
    ] = dataclasses.field(default_factory=list)
    max_length: MaxLength = None
    show_examples: Annotated[
        int, option("--show-examples", "Print this many tokenised rows with their mask.", "Data")
    ] = 0
    resume: Annotated[bool, option("--resume", "Go on from --out with its own options.")] = False
    overwrite: Annotated[bool, option("--overwrite", "Replace what is in --out.")] = False
    config: Annotated[
        str | None,
        option("--config", "A .toml or .yaml file with the same names; flags win.", is_eager=True, callback=apply),
    ] = None


# Not part of what a run is: they say how this one command is to behave. --plugin is among them because it runs code,
# and nothing that a run's folder names may do that.
PER_CALL = ("resume", "overwrite", "config", "json", "show_examples", "plugin")
# Rights, which are the user's to give: a run's folder names them, and going on with it does not bring them back.
RIGHTS = ("trust_remote_code", "plugin", "report_to", "out")
# What a run may be given anew when it goes on: it changes how a step is evaluated, not which steps are made.
CHANGEABLE = ("memory",)
