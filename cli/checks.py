"""Check and resolve the options of ``zowrap tune`` before a model is opened.

The checks that need no torch come first, because importing it takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from zowrap import names
from zowrap.cli.console import quiet_libraries
from zowrap.cli.options import SharedOptions, TuneOptions, load_plugins, split_labels
from zowrap.cli.scope import check_scope
from zowrap.cli.spelling import spelled_for
from zowrap.cli.step import choose_step_method, learning_rate, rule_options, step_values
from zowrap.errors import ZOError, first_line, nearest, need_package
from zowrap.names import python_file
from zowrap.step.options import ENTRIES, check_values
from zowrap.storage.atomic import contains, is_same_place
from zowrap.storage.folder import RunFolder
from zowrap.storage.safetensors import check_directory
from zowrap.tasks.labels import read_label
from zowrap.tasks.rows import check_source, read_first_row, read_text

SCHEDULES = ("constant", "linear", "cosine")
PATHS = ("model", "data", "eval_data", "test_data")


def check_at_once(options: TuneOptions, asked: frozenset[str] = frozenset()) -> None:
    """Raise :class:`ZOError` for the first option that is seen to be wrong without torch; nothing is written.

    Args:
        asked: the options that the user gave, see :func:`zowrap.cli.scope.list_asked`.
    """
    if options.model is None:
        raise ZOError("which model? give its directory or its name on the hub")
    if options.data is None:
        raise ZOError("what is it to learn? give --data FILE")
    if options.out is None:
        raise ZOError("where is the run to be written? give --out RUN")
    one_of("--task", options.task, names.TASKS)
    one_of("--lr-schedule", options.lr_schedule, SCHEDULES)
    check_step_options(options)
    learning_rate(options)
    at_least(
        options,
        steps=1,
        grad_accum=1,
        warmup_steps=0,
        eval_every=1,
        eval_batch_size=1,
        max_eval_examples=1,
        save_every=1,
        save_total_limit=0,
        seed=0,
        max_length=2,
        show_examples=0,
    )
    check_scope("tune", asked, task=options.task, form=None if options.head == "auto" else options.head)
    for file in filter(None, (options.data, options.eval_data, options.test_data)):
        check_source(file)
        _check_first_row(file, options)
    check_directory(options.model, whole=False)
    _check_out(options)
    check_out_is_free(options)


def check_step_options(options: SharedOptions) -> None:
    """The same for what ``tune`` and ``inspect`` share."""
    for plugin in options.plugin:
        python_file(plugin)
    _check_rule(options)
    rule_options(options)
    with spelled_for(options):
        check_values(options, [name for name in ENTRIES if name != "lr"])
    one_of("--head", options.head, (*names.FORMS, "auto"))
    one_of("--dtype", options.dtype, (*names.DTYPES, "auto"))
    check_quantization(options)
    if options.head == "vectors" and (
        options.use_peft or options.load_in_8bit or options.load_in_4bit or options.quantized
    ):
        raise ZOError(
            "--head vectors moves label vectors and leaves the encoder as it is: leave out --use-peft, "
            "--load-in-8bit, --load-in-4bit and --quantized, or take --head sentence"
        )
    at_least(options, batch_size=1, lora_r=1, lora_alpha=1)
    split_labels(options.labels)


def check_options(options: TuneOptions) -> None:
    """Raise :class:`ZOError` for the first option that the library refuses; no model is loaded, nothing is written."""
    with spelled_for(options):
        choose_step_method(options)
        _check_trackers(options.report_to)
        to_config(options)


def at_least(options: Any, **least: int) -> None:
    """Raise :class:`ZOError` for the first option of these names that is below its number; one not given passes."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise ZOError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")


def _check_rule(options: SharedOptions) -> None:
    """Refuse a rule that cannot exist; one that a plugin or an installed package may bring is looked up when they load.

    In a process that has rules loaded already, those are the ones there are.
    """
    loaded = sys.modules.get("zowrap.rules")
    known = [*(names.RULES if loaded is None else loaded.REGISTRY), *names.RULE_ALIASES]
    if options.rule in known or options.plugin or importlib.metadata.entry_points(group=names.RULES_OF_PACKAGES):
        return
    raise names.unknown_rule(options.rule, known)


def _check_first_row(file: str, options: TuneOptions) -> None:
    """Refuse columns that the first row does not have."""
    row = read_first_row(file)
    if row is None or options.task != "classification":
        return
    read_label(row, options.label_column)
    if options.template is None:
        read_text(row, options.text_column)
    if options.text_pair_column is not None:
        read_text(row, options.text_pair_column, "--text-pair-column")


def check_quantization(options: SharedOptions) -> None:
    """Raise :class:`ZOError` for options about quantisation and adapters that exclude or need one another."""
    if options.load_in_8bit and options.load_in_4bit:
        raise ZOError("--load-in-8bit and --load-in-4bit are two ways to load a model: give one")
    if options.load_in_4bit and options.quantized not in (None, "adapters"):
        raise ZOError(f"--quantized {options.quantized} is for 8-bit weights: 4-bit ones take adapters")
    if options.use_peft and options.quantized not in (None, "adapters"):
        raise ZOError(f"--use-peft moves adapters, --quantized {options.quantized} something else: give one of them")
    if options.load_in_8bit or options.load_in_4bit:
        need_package("bitsandbytes")
    if options.use_peft or options.quantized == "adapters" or options.load_in_4bit:
        need_package("peft")


def one_of(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise :class:`ZOError` for a name that is not among ``choices``; one not given passes."""
    if value is not None and value not in choices:
        raise ZOError(f"unknown {option} {value!r}{nearest(value, choices)}")


def _check_trackers(names: list[str]) -> None:
    """Refuse a ``--report-to`` that transformers does not know or that is not installed."""
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ZOError(f"--report-to {name}: {first_line(error)}") from error


def _check_out(options: TuneOptions) -> None:
    out = Path(str(options.out))
    if out.exists() and not out.is_dir():
        raise ZOError(f"--out {out} is a file: give the name of a directory")
    if is_same_place(out, str(options.model)):
        raise ZOError(f"--out {out} is the model's own directory: the run would replace the model it starts from")
    if options.overwrite and Path(str(options.model)).exists() and contains(out, str(options.model)):
        raise ZOError(f"--out {out} holds the model that the run starts from, and --overwrite would remove it")
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ZOError(f"--out {out} cannot be written: {parent} is not a directory you may write to")


def check_out_is_free(options: TuneOptions) -> None:
    """Raise :class:`ZOError` if ``--out`` holds anything and may neither be gone on with nor replaced.

    What a start that was killed in its first calls left there is nothing.
    """
    if RunFolder(str(options.out)).has_content() and not (options.overwrite or options.resume):
        raise ZOError(f"--out {options.out} exists and is not empty: give another, or --resume or --overwrite")


def to_config(options: TuneOptions) -> Any:
    """The trainer's arguments; building them checks the rest."""
    from zowrap.training.config import ZOConfig

    schedule = options.lr_schedule  # None: ZOConfig chooses
    if schedule == "constant" and options.warmup_steps:
        schedule = "constant_with_warmup"
    due = {"eval_steps": options.eval_every if options.eval_data else None, "save_steps": options.save_every}
    try:
        return ZOConfig(
            output_dir=str(options.out),
            rule_options=rule_options(options) or None,
            **step_values(options),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.eval_batch_size or max(32, options.batch_size),
            gradient_accumulation_steps=options.grad_accum,
            lr_scheduler_type=schedule,
            warmup_steps=options.warmup_steps,
            save_total_limit=options.save_total_limit,
            report_to=options.report_to or "none",
            # Of a language model the loss is what matters; a class is right or wrong.
            metric_for_best_model="accuracy" if options.task == "classification" else "loss",
            greater_is_better=options.task == "classification",
            overwrite=options.overwrite,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{name: value for name, value in due.items() if value is not None},  # type: ignore[arg-type]
        )
    except ZOError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks
        raise ZOError(first_line(error)) from error


def check_recorded_rule(config: dict[str, Any], run: Path, plugin: list[str]) -> None:
    """Raise :class:`ZOError` where a run was made by a rule that is not here. Torch is imported for a foreign one."""
    saved = config["options"]
    if saved["rule"] not in (*names.RULES, *names.RULE_ALIASES):
        quiet_libraries()
        from zowrap.rules.registry import find_recorded

        load_plugins(plugin)
        find_recorded(saved["rule"], run, saved.get("plugin") or ())
