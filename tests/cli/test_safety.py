"""What a folder may not do: run code, bring rights back, have the base model written over, end up a dead end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome, make_model
from tests.support.slow import slow_except

Cli = Callable[..., Outcome]
QUICK = ("--task", "lm", "--engine", "eager", "--steps", 3, "--batch-size", 4, "--lr", "1e-3", "--save-every", 2)


def tune(cli: Cli, model: Any, data: dict[str, Path], out: Any, *more: Any) -> Outcome:
    return cli("tune", model, "--data", data["train"], *QUICK, "--out", out, *more)


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def unfinished(run: Path, **options: Any) -> None:
    """As if the run had been killed after its checkpoint, and somebody had changed its options."""

    def change(config: dict[str, Any]) -> None:
        config["status"] = {"state": "running", "step": 2}
        config["options"].update(options)

    change_json(run / "zowrap.json", change)
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(lines[:3]))
    shutil.rmtree(run / "checkpoint-3", ignore_errors=True)


CODE = """
open({mark!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig): model_type = "brought"
class L(LlamaForCausalLM): config_class = C
"""


@pytest.mark.parametrize(
    "said", [True, pytest.param("true", marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_resuming_runs_no_code_that_the_run_names(
    said: Any, zowrap_cli: Cli, data: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    assert tune(zowrap_cli, models["causal"], data, run).code == 0
    base = Path(shutil.copytree(models["causal"], run / "base"))
    (base / "brought.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "brought.C", "AutoModelForCausalLM": "brought.L"}
    change_json(base / "config.json", lambda config: config.update(model_type="brought", auto_map=auto))
    unfinished(run, model=str(base), trust_remote_code=said)
    told = zowrap_cli("tune", "--resume", "--out", run)
    assert told.code == 2 and "give --trust-remote-code again" in told.err and not mark.exists()
    trusted = zowrap_cli("tune", "--resume", "--out", run, "--trust-remote-code")
    assert trusted.code == 0, trusted.err
    assert mark.exists()


def test_destinations_of_reports_are_not_brought_back(
    zowrap_cli: Cli, data: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert tune(zowrap_cli, models["causal"], data, run).code == 0
    unfinished(run, report_to=["tensorboard"], out=str(tmp_path / "elsewhere"))
    told = zowrap_cli("tune", "--resume", "--out", run)
    assert told.code == 0 and "give --report-to again" in told.err
    assert not (tmp_path / "elsewhere").exists() and not list(run.rglob("events.out*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "megatron.brought"},
        {"megatron_core": "os"},
        {"megatron_config": {"x": 1}},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
    ],
)
def test_adapters_that_name_code_are_refused(
    settings: dict[str, Any], zowrap_cli: Cli, data: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert tune(zowrap_cli, models["causal"], data, run, "--use-peft").code == 0
    change_json(run / "adapter_config.json", lambda config: config.update(settings))
    for command in (
        ("eval", run, "--data", data["train"]),
        ("export", run, "--to", tmp_path / "merged", "--format", "merged"),
        ("export", run, "--to", tmp_path / "same"),
    ):
        told = zowrap_cli(*command)
        assert told.code == 2 and "adapter_config.json" in told.err, told.err
    assert not (tmp_path / "merged").exists() and not (tmp_path / "same").exists()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory with a model in it; the working directory is beside it."""
    home = tmp_path / "home"
    make_model("causal", home / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "here")
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_home_directory_is_one_place_in_every_option(zowrap_cli: Cli, data: dict[str, Path], home: Path) -> None:
    before = contents(home / "base")
    (home / "run.toml").write_text(f'out = "~/base"\ntask = "lm"\ndata = "{data["train"]}"\nsteps = 1\n')
    shutil.copy(data["train"], home / "train.jsonl")
    for command in (
        ("tune", home / "base", "--config", "~/run.toml", "--overwrite"),
        ("tune", "~/base", "--data", "~/train.jsonl", *QUICK, "--out", "~/base", "--overwrite"),
        ("export", "~/base", "--to", home / "base" / "x" / "..", "--overwrite"),
    ):
        told = zowrap_cli(*command)
        assert told.code == 2 and contents(home / "base") == before, told.err
    assert zowrap_cli("tune", "~/base", "--data", "~/train.jsonl", *QUICK, "--out", "~/run").code == 0
    assert "is finished" in zowrap_cli("tune", "--resume", "--out", home / "run").err
    assert zowrap_cli("eval", "~/run", "--data", "~/train.jsonl", "--predictions", "~/told.jsonl").code == 0
    assert zowrap_cli("export", "~/run", "--to", "~/exported").code == 0
    assert zowrap_cli("replay", "~/base", "~/run", "--to", "~/replayed").code == 0
    assert {"run", "told.jsonl", "exported", "replayed"} <= {path.name for path in home.iterdir()}
    assert not list(Path.cwd().iterdir())


def test_every_option_that_names_a_place_is_expanded() -> None:
    import dataclasses
    from typing import get_type_hints

    from zowrap.cli import eval, export, inspect, options, paths, replay

    tables = (options.TuneOptions, eval.EvalOptions, export.ExportOptions, replay.ReplayOptions, inspect.InspectOptions)
    for table in tables:
        hints = get_type_hints(table, include_extras=True)
        for field in dataclasses.fields(table):
            texts = [getattr(each, "help", None) or "" for each in getattr(hints[field.name], "__metadata__", ())]
            names_a_place = any(word in text.lower() for text in texts for word in ("director", "file", "the run"))
            if names_a_place and field.name not in ("config", "resume", "overwrite", "eval_every", "save_every"):
                assert paths.PATH in hints[field.name].__metadata__, f"{table.__name__}.{field.name}"


def test_the_base_model_is_never_a_target(zowrap_cli: Cli, data: dict[str, Path], tmp_path: Path) -> None:
    base, run = make_model("causal", tmp_path / "base"), tmp_path / "run"
    assert tune(zowrap_cli, base, data, run).code == 0
    (tmp_path / "alias").symlink_to(base, target_is_directory=True)
    before, tuned = contents(base), contents(run)
    for command in (
        ("tune", base, "--data", data["train"], *QUICK, "--out", tmp_path / "alias", "--overwrite"),
        ("export", run, "--to", base, "--overwrite"),
        ("export", run, "--to", tmp_path / "alias", "--overwrite"),
        ("replay", base, run, "--to", tmp_path / "alias", "--overwrite"),
        ("replay", base, run, "--to", run, "--overwrite"),
        ("eval", run, "--data", data["train"], "--predictions", run / "model.safetensors"),
        ("eval", run, "--data", data["train"], "--predictions", data["train"]),
    ):
        told = zowrap_cli(*command)
        assert told.code == 2 and told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
        assert contents(base) == before and contents(run) == tuned


@pytest.mark.parametrize(
    "left",
    slow_except(
        [["model.tmp/config.json"]],
        [["zowrap.json.tmp"], ["model.tmp/config.json"], [".zowrap.lock", "journal.jsonl.tmp"]],
    ),
)
def test_a_start_that_was_killed_in_its_first_calls_is_started_again(
    left: list[str], zowrap_cli: Cli, data: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name in left:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{")
    told = zowrap_cli("tune", "--resume", "--out", run)
    assert told.code == 2 and "no run" in told.err
    assert tune(zowrap_cli, models["causal"], data, run).code == 0
    assert not list(run.glob("*.tmp"))


def test_what_only_looks_like_a_leftover_is_the_users(
    zowrap_cli: Cli, data: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.tmp").write_text("mine")
    told = tune(zowrap_cli, models["causal"], data, run)
    assert told.code == 2 and "is not empty" in told.err
    assert tune(zowrap_cli, models["causal"], data, run, "--overwrite").code == 0
    assert (run / "notes.tmp").read_text() == "mine"


def test_a_model_inside_the_target_is_not_removed_with_it(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert tune(zowrap_cli, models["causal"], data, run, "--save-total-limit", 0).code == 0
    before = contents(run)
    for command in (
        ("tune", run / "checkpoint-2", "--data", data["train"], *QUICK, "--out", run, "--overwrite"),
        ("export", run / "checkpoint-2", "--to", run, "--overwrite"),
    ):
        told = zowrap_cli(*command)
        assert told.code == 2 and told.err.count("error: ") == 1, told.err
        assert contents(run) == before


def test_nothing_of_an_overwritten_model_stays(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for more, files in (
        ((), {"config.json", "model.safetensors"}),
        (("--use-peft",), {"adapter_config.json", "adapter_model.safetensors"}),
        ((), {"config.json", "model.safetensors"}),
    ):
        assert tune(zowrap_cli, models["causal"], data, run, *more, "--overwrite").code == 0
        models_files = {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"}
        assert models_files & {path.name for path in run.iterdir()} == files
        assert zowrap_cli("eval", run, "--data", data["train"]).code == 0


def test_an_export_holds_nothing_of_the_evaluations(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run, to = tmp_path / "run", tmp_path / "to"
    assert tune(zowrap_cli, models["causal"], data, run, "--eval-data", data["test"]).code == 0
    assert (run / "before.json").is_file() and zowrap_cli("export", run, "--to", to).code == 0
    assert not (to / "before.json").exists()
