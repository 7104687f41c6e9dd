"""An option that would do nothing is refused, in every command; one that does something is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome, write_rows
from zowrap import names
from zowrap.cli import eval, export, inspect
from zowrap.cli.options import TuneOptions
from zowrap.cli.scope import SCOPES, check_scope
from zowrap.errors import ZOError

Cli = Callable[..., Outcome]
COMMANDS = {
    "tune": TuneOptions,
    "eval": eval.EvalOptions,
    "inspect": inspect.InspectOptions,
    "export": export.ExportOptions,
}
LM, PEFT = ("--task", "lm"), ("--use-peft",)


def test_the_table_names_options_and_kinds_that_there_are() -> None:
    for scope in SCOPES:
        for command in scope.commands:
            fields = {field.name for field in dataclasses.fields(COMMANDS[command])}
            taken = fields - set(getattr(COMMANDS[command], "LEFT_OUT", ()))
            assert {scope.option, *(need.partition("=")[0] for need in scope.needs)} <= taken, (command, scope)
        assert set(scope.task) <= set(names.TASKS) and set(scope.form) <= set(names.FORMS)
        assert set(scope.format) <= set(names.FORMATS) and set(scope.layout) <= {"text", "prompt", "messages"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((*LM, "--labels", "a,b"), "--labels does nothing with --task lm, it is for --task classification"),
        ((*LM, "--head", "words"), "--head does nothing with --task lm"),
        ((*LM, "--label-column", "label"), "--label-column does nothing with --task lm"),
        ((*LM, "--text-pair-column", "label"), "--text-pair-column does nothing with --task lm"),
        ((*LM, "--template", "Q: {text}"), "--template does nothing with --task lm"),
        (("--end-of-text",), "--end-of-text does nothing with --task classification"),
        (("--head", "sentence", "--text-pair-column", "text"), "--text-pair-column does nothing with --head sentence"),
        (("--text-pair-column", "text"), "--text-pair-column"),  # the encoder's own form is no head
        (("--template", "{label} of {more}", "--text-column", "text"), "no such field"),
    ],
)
@pytest.mark.parametrize("command", ["tune", "eval"])
def test_options_of_other_tasks_are_refused(
    zowrap_cli: Cli,
    models: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
    command: str,
    options: tuple,
    sentence: str,
) -> None:
    out = ("--out", tmp_path / "run") if command == "tune" else ()
    model = models["causal" if "lm" in options else "encoder"]
    told = zowrap_cli(command, model, "--data", data["train"], *out, *options)
    assert told.code == 2 and sentence in told.err.splitlines()[-1], told.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--eval-every", "2"), "--eval-every does nothing without --eval-data"),
        (("--max-eval-examples", "2"), "--max-eval-examples does nothing without --eval-data"),
        (("--eval-batch-size", "2"), "--eval-batch-size does nothing without --eval-data or --test-data"),
        (("--block-order", "random"), "--block-order does nothing without --blocks"),
        (("--lora-r", "8"), "--lora-r does nothing without --use-peft"),  # the default, but asked for
        (("--quantized", "scales", "--lora-alpha", "3"), "--lora-alpha does nothing without --use-peft"),
        (("--engine", "eager", "--memory", "paired"), "--memory does nothing with --engine eager"),
    ],
)
def test_options_of_tune_need_their_others(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, options: tuple, sentence: str
) -> None:
    told = zowrap_cli("tune", models["encoder"], "--data", data["train"], "--out", tmp_path / "run", *options)
    assert told.code == 2 and sentence in told.err.splitlines()[-1], told.err


@pytest.mark.parametrize("layout", ["prompt", "messages"])
def test_options_of_plain_text_are_refused_with_other_data(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "assistant", "content": "good"}]}])
    file = data["prompts"] if layout == "prompt" else chat
    told = zowrap_cli("eval", models["causal"], *LM, "--data", file, "--end-of-text")
    assert told.code == 2 and f"--end-of-text does nothing with data of the kind '{layout}'" in told.err


def test_the_options_of_a_file_are_asked_for_as_well(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'task = "lm"\nhead = "auto"\nout = {json.dumps(str(tmp_path / "run"))}\nlabels = ["a", "b"]\n')
    told = zowrap_cli("tune", models["causal"], "--data", data["train"], "--config", config)
    assert told.code == 2 and "--labels does nothing with --task lm" in told.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--labels", "a,b"), "--labels does nothing without --task classification"),
        (("--head", "words"), "--head does nothing without --task classification"),
        (("--task", "classification", "--template", "{text}"), "--template does nothing without --data"),
        (("--task", "lm", "--text-column", "text"), "--text-column does nothing without --data"),
        (("--task", "lm", "--labels", "a,b"), "--labels does nothing with --task lm"),
        (("--engine", "eager", "--memory", "paired"), "--memory does nothing with --engine eager"),
    ],
)
def test_inspect_refuses_what_it_does_not_read(
    zowrap_cli: Cli, models: dict[str, Path], options: tuple, sentence: str
) -> None:
    told = zowrap_cli("inspect", models["causal"], *options)
    assert told.code == 2 and sentence in told.err, told.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--format", "bf16", "--dtype", "float32"), "--dtype does nothing with --format bf16"),
        (("--format", "merged", "--allow-pickle"), "--allow-pickle does nothing with --format merged"),
        (("--format", "adapters", "--max-shard-size", "1MB"), "--max-shard-size does nothing with --format adapters"),
        (("--max-shard-size", "large"), "--max-shard-size is a number of KB"),
        (("--max-shard-size", "0GB"), "--max-shard-size is a number of KB"),
    ],
)
def test_export_refuses_what_its_format_has_not(
    zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path, options: tuple, sentence: str
) -> None:
    told = zowrap_cli("export", models["causal"], "--to", tmp_path / "to", *options)
    assert told.code == 2 and sentence in told.err and not (tmp_path / "to").exists(), told.err


def test_a_run_refuses_what_its_task_has_not(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    for kind, file, refused in (
        ("lm", data["train"], (("--template", "A: {text}"), ("--label-column", "label"))),
        ("lm", data["prompts"], (("--text-column", "completion"), ("--end-of-text",))),
        ("classification", data["train"], (("--end-of-text",), ("--text-pair-column", "text"))),
    ):
        run = tmp_path / f"{kind}{file.stem}"
        command = ("tune", models["causal"], "--task", kind, "--data", file, "--steps", 1, "--engine", "eager")
        assert zowrap_cli(*command, "--lr", "1e-6", "--out", run).code == 0
        for options in refused:
            told = zowrap_cli("eval", run, "--data", file, *options)
            assert told.code == 2 and f"{options[0]} does nothing with" in told.err, told.err


def test_what_has_an_effect_passes() -> None:
    check_scope(
        "tune", frozenset({"eval_every", "eval_data", "head", "labels"}), task="classification", form="sequence"
    )
    check_scope("tune", frozenset({"lora_r", "quantized", "quantized=adapters"}), task="lm", layout="text")
    check_scope("tune", frozenset({"text_pair_column", "template"}), task="classification", form="sequence")
    check_scope("inspect", frozenset({"template", "data"}), task="classification")
    check_scope("export", frozenset({"max_shard_size", "format"}), format="merged")
    with pytest.raises(ZOError):
        check_scope("tune", frozenset({"lora_r", "quantized", "quantized=codes"}), task="lm")
