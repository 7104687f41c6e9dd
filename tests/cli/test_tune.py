"""``zowrap tune``: a run that loads, every wrong input told in one sentence with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Outcome, make_model, reviews, write_rows

Cli = Callable[..., Outcome]
QUICK = ("--engine", "eager", "--steps", 4, "--batch-size", 4)


@pytest.mark.parametrize(
    ("kind", "task", "file"),
    [
        ("sequence", "classification", "train"),
        ("encoder", "classification", "train"),
        ("causal", "classification", "train"),
        ("causal", "lm", "train"),
        ("causal", "lm", "prompts"),
    ],
)
def test_a_run_loads_and_evaluates_to_what_tune_said(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, kind: str, task: str, file: str
) -> None:
    run = tmp_path / "run"
    test = data["prompts"] if file == "prompts" else data["test"]
    tuned = zowrap_cli(
        "tune", models[kind], "--task", task, "--data", data[file], "--eval-data", test, *QUICK, "--lr", "1e-2",
        "--out", run, "--json",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    record = tuned.json
    assert record["steps"] == record["steps_run"] == 4 and record["resumed_from"] == 0
    assert record["forwards"] == 8 and record["rule"] == "meazo" and record["engine"] == "eager"
    assert len((run / "journal.jsonl").read_text().splitlines()) == 5
    assert not [p for p in run.rglob("*") if p.suffix not in (".json", ".jsonl", ".safetensors", ".png", "")]

    measured = zowrap_cli("eval", run, "--data", test, "--json")
    assert measured.code == 0, measured.err
    assert measured.json["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert measured.json["accuracy"] == pytest.approx(record["accuracy"])

    import transformers

    auto = {"sequence": "AutoModelForSequenceClassification", "encoder": "AutoModel", "causal": "AutoModelForCausalLM"}
    before = getattr(transformers, auto[kind]).from_pretrained(models[kind])
    after = getattr(transformers, auto[kind]).from_pretrained(run)
    transformers.AutoTokenizer.from_pretrained(run)
    moved = [n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)]
    assert moved or record["best_step"] == 0


def test_the_same_command_gives_the_same_weights(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    weights = []
    for name, engine_seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name
        command = ("tune", models["encoder"], "--data", data["train"], *QUICK, "--seed", engine_seed, "--out", out)
        assert zowrap_cli(*command).code == 0
        weights.append((out / "model.safetensors").read_bytes()[-4096:])
    assert weights[0] == weights[1] != weights[2]


def test_16_bit_weights_move_and_are_kept(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    command = ("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run", "--json")
    told = zowrap_cli(*command, "--dtype", "bfloat16")
    assert told.code == 0 and "bfloat16 (as asked)" in told.err
    before, after = (load_file(path / "model.safetensors") for path in (models["encoder"], tmp_path / "run"))
    name = "encoder.layer.0.output.dense.weight"
    assert after[name].dtype == torch.bfloat16 and not after[name].equal(before[name].bfloat16())
    assert after["pooler.dense.weight"].equal(before["pooler.dense.weight"].bfloat16())  # not used, so not moved


# --- wrong input --------------------------------------------------------------------------------------------------

GOOD_ROWS = reviews(8)
WRONG_DATA: list[tuple[str, list[Any] | bytes, str]] = [
    ("empty", b"", "is empty"),
    (
        "no column",
        [{"sentence": "x", "label": x} for x in "ab"],
        "line 1 has no column 'text' (columns: label, sentence)",
    ),
    ("no label", [*GOOD_ROWS, {"text": "x"}], "line 9 has no column 'label'"),
    ("null text", [*GOOD_ROWS, {"text": None, "label": "good"}], "line 9: column 'text' is null"),
    ("text is no string", [*GOOD_ROWS, {"text": 3, "label": "good"}], "line 9: column 'text' is the number 3"),
    ("null label", [*GOOD_ROWS, {"text": "x", "label": None}], "line 9: column 'label' is null"),
    ("one label", [row for row in GOOD_ROWS if row["label"] == "good"], "there is only 'good'"),
    ("not UTF-8", b'{"text": "x", "label": "a"}\n{"text": "\xfe", "label": "b"}\n', "line 2 is not valid UTF-8"),
    ("not JSON", b'{"text": "x", "label": "a"}\n{"text": "y", "label"}\n', "line 2 is not valid JSON"),
]


@pytest.mark.parametrize(("name", "rows", "message"), WRONG_DATA, ids=[name for name, _, _ in WRONG_DATA])
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_data_is_one_sentence(
    zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path, name: str, rows: Any, message: str, as_json: bool
) -> None:
    file = tmp_path / "train.jsonl"
    if isinstance(rows, bytes):
        file.write_bytes(rows)
    else:
        write_rows(file, rows)
    told = zowrap_cli(
        "tune", models["encoder"], "--data", file, *QUICK, "--out", tmp_path / "run", *(["--json"] if as_json else [])
    )
    assert_refused(told, message, as_json)
    assert not (tmp_path / "run").exists()


def assert_refused(told: Outcome, message: str, as_json: bool = False) -> None:
    assert told.code == 2, told.err
    if as_json:
        assert set(told.json) == {"error"} and message in told.json["error"], told.out
    else:
        assert told.out == "" and told.err.count("error: ") == 1 and "Traceback" not in told.err
        assert message in told.err.splitlines()[-1], told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("--rule", "meazzo"), "unknown rule 'meazzo'; did you mean 'meazo'?"),
        (("--rule-option", "betta=0.9"), "no hyper-parameter 'betta'; did you mean 'beta'?"),
        (("--rule-option", "beta"), "--rule-option takes name=value"),
        (("--rule-option", "beta=1.5"), "--rule-option beta must lie in [0, 1), got 1.5"),
        (("--direction", "gausian"), "did you mean 'gaussian'?"),
        (("--estimator", "centrall"), "did you mean 'central'?"),
        (("--block-order", "ascend"), "did you mean 'ascending'?"),
        (("--engine", "compile"), "did you mean 'compiled'?"),
        (("--memory", "sequental"), "unknown --memory 'sequental'; did you mean 'sequential'?"),
        (("--lr-schedule", "cosin"), "did you mean 'cosine'?"),
        (("--head", "sentense"), "did you mean 'sentence'?"),
        (("--task", "clasification"), "did you mean 'classification'?"),
        (("--dtype", "bfloat"), "did you mean 'bfloat16'?"),
        (("--report-to", "tensorbord"), "tensorbord"),
        (("--lr", "0"), "--lr must be a positive finite number or auto, got 0"),
        (("--lr", "nan"), "--lr must be a positive finite number or auto, got nan"),
        (("--lr", "fast"), "--lr must be a positive finite number or auto, got fast"),
        (("--eps", "-1"), "--eps must be a positive finite number, got -1.0"),
        (("--eps", "inf"), "--eps must be a positive finite number, got inf"),
        (("--weight-decay", "-1"), "--weight-decay must be a finite number from 0, got -1.0"),
        (("--eps", "small"), "Invalid value for '--eps'"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--queries", "0"), "--queries must be a whole number from 1, got 0"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--max-length", "1"), "--max-length must be at least 2"),
        (("--labels", "a,,b"), "has an empty name"),
        (("--labels", "bad"), "at least two labels"),
        (("--labels", "bad,bad"), "same label twice"),
        (("--labels", "awful,bad"), "label 'good' is not one of the labels"),
        (("--text-column", "body"), "has no column 'body'"),
        (("--template", "{text} {label}"), "which only --head words uses"),
        (("--trainable", "nothing.like.this"), "nothing is left to tune"),
        (("--stesp", "3"), "--steps"),
        (("--resume", "--overwrite"), "give one of them"),
    ],
)
def test_wrong_options_are_one_sentence(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, arguments: tuple, message: str
) -> None:
    told = zowrap_cli("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run", *arguments)
    assert_refused(told, message)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_left_out_is_named(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]) -> None:
    assert_refused(zowrap_cli("tune"), "which model?")
    assert_refused(zowrap_cli("tune", models["encoder"]), "give --data FILE")
    assert_refused(zowrap_cli("tune", models["encoder"], "--data", data["train"]), "give --out RUN")
    assert_refused(zowrap_cli("tune", "--resume"), "give --out RUN")


def test_a_label_that_training_never_saw(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "dev.jsonl", [*reviews(3), {"text": "movie", "label": "odd"}])
    told = zowrap_cli(
        "tune", models["encoder"], "--data", data["train"], "--eval-data", file, *QUICK, "--out", tmp_path / "run"
    )
    assert_refused(told, "dev.jsonl line 4: label 'odd' is not one of the labels of training ('bad', 'good')")
    for number in (1, True):
        write_rows(file, [*reviews(3), {"text": "movie", "label": number}])
        command = ("tune", models["encoder"], "--data", data["train"], "--eval-data", file, *QUICK)
        told = zowrap_cli(*command, "--out", tmp_path / "run")
        assert_refused(told, f"dev.jsonl line 4: label '{str(number).lower()}' is not one of the labels of training")
    told = zowrap_cli(*command, "--labels", "bad,good", "--out", tmp_path / "run")
    assert told.code == 0, told.err


def test_models_that_cannot_be_loaded(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    def tune(model: Any) -> Outcome:
        return zowrap_cli("tune", model, "--data", data["train"], *QUICK, "--out", tmp_path / "run")

    assert_refused(tune("./nowhere"), "no such model directory: ./nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(models["encoder"], bare)
    for content in (b"", (bare / "model.safetensors").read_bytes()[:-10]):
        (bare / "model.safetensors").write_bytes(content)
        assert_refused(tune(bare), "model.safetensors is not a complete safetensors file")
    (bare / "model.safetensors").unlink()
    assert_refused(tune(bare), "no weights")
    torch.save({}, bare / "pytorch_model.bin")
    assert_refused(tune(bare), f"zowrap export {bare} --to DIR --allow-pickle")
    assert_refused(tune("nobody/no-such-model"), "HF_TOKEN")
    assert not (tmp_path / "run").exists()


def test_an_occupied_out_is_left_alone(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("do not lose me")
    command = ("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", run)
    assert_refused(zowrap_cli(*command), "exists and is not empty")
    assert_refused(zowrap_cli(*command, "--resume"), "is not a run")
    assert zowrap_cli(*command, "--overwrite").code == 0
    assert (run / "thesis.txt").read_text() == "do not lose me" and (run / "model.safetensors").is_file()
    assert_refused(zowrap_cli(*command[:-1], run / "thesis.txt"), "is a file")
    copy = tmp_path / "copy"
    shutil.copytree(models["encoder"], copy)
    told = zowrap_cli("tune", copy, "--data", data["train"], *QUICK, "--out", copy, "--overwrite")
    assert_refused(told, "the model's own directory")


def test_a_model_that_is_not_finite_is_refused_by_the_name_of_the_weight(
    zowrap_cli: Cli, data: dict[str, Path], tmp_path: Path
) -> None:
    import safetensors.torch

    model = make_model("encoder", tmp_path / "model")
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"].fill_(float("nan"))
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    command = ("tune", model, "--data", data["train"], "--eval-data", data["test"], *QUICK, "--out", tmp_path / "run")
    for _ in range(2):  # it leaves nothing that the same command would stumble over
        assert_refused(zowrap_cli(*command), "the model's own embeddings.word_embeddings.weight holds")
        assert not (tmp_path / "run").exists()


def test_long_text_is_cut_and_counted_once(zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    rows = [*reviews(6), *({"text": "movie " * 99, "label": x} for x in ("bad", "good"))]
    file = write_rows(tmp_path / "train.jsonl", rows)
    told = zowrap_cli("tune", models["encoder"], "--data", file, *QUICK, "--out", tmp_path / "run")
    assert told.code == 0 and told.err.count("2 of 8 training rows were longer than 32 tokens and cut") == 1


# --- going on -----------------------------------------------------------------------------------------------------


def test_resume_uses_the_runs_own_options(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap.cli import progress

    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("--data", data["train"], "--eval-data", data["test"], "--engine", "eager", "--steps", 8, "--lr", "1e-3")
    assert zowrap_cli("tune", models["encoder"], *options, "--out", whole).code == 0

    class Stop(progress.Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        assert zowrap_cli("tune", models["encoder"], *options, "--out", run).code == 1
    assert_refused(zowrap_cli("tune", models["encoder"], *options, "--out", run), "not empty")
    monkeypatch.chdir(tmp_path)
    told = zowrap_cli("tune", "--resume", "--out", "run", "--lr", "0.5", "--json")
    assert told.code == 0, told.err
    assert "--lr 0.5 differs from the run's own 0.001, which is used: a run keeps its options" in told.err
    assert told.json["resumed_from"] > 0 and told.json["steps_run"] == 8 - told.json["resumed_from"]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((run / "zowrap.json").read_text())["task"]["form"] == "sentence"

    again = zowrap_cli("tune", "--resume", "--out", run, "--json")
    assert again.code == 0 and again.json["steps_run"] == 0 and again.json["accuracy"] == told.json["accuracy"]


@pytest.mark.parametrize(
    ("kind", "changed", "sentence"),
    [
        (
            "sequence",
            [{"text": f"other movie {i}", "label": ("good", "bad")[i % 2]} for i in range(24)],
            "differ from those",
        ),
        ("sequence", reviews(24)[:-1], "differ from those that"),
        ("sequence", [*reviews(24), {"text": "so so", "label": "odd"}], "label 'odd' is not one of the labels"),
        ("encoder", [{**row, "label": row["label"].upper()} for row in reviews(24)], "is not one of the labels"),
        (
            "encoder",
            [{**row, "label": {"good": "bad", "bad": "good"}[row["label"]]} for row in reviews(24)],
            "differ from",
        ),
        ("sequence", [{**row, "more": 1} for row in reviews(24)], None),  # nothing that is used
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    zowrap_cli: Cli,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    changed: list,
    sentence: str | None,
) -> None:
    from zowrap.cli import progress

    class Stop(progress.Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("the machine went down")

    file, run = write_rows(tmp_path / "train.jsonl", reviews(24)), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        assert zowrap_cli("tune", models[kind], "--data", file, *QUICK, "--lr", "1e-6", "--out", run).code == 1
    before = (run / "zowrap.json").read_bytes()
    write_rows(file, changed)
    told = zowrap_cli("tune", "--resume", "--out", run)
    if sentence is None:
        assert told.code == 0, told.err
        return
    assert_refused(told, sentence)
    assert (run / "zowrap.json").read_bytes() == before


@pytest.mark.slow
def test_the_learning_rate_is_chosen_once(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap.cli import progress
    from zowrap.training import auto_lr

    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("--data", data["train"], "--eval-data", data["test"], "--engine", "eager", "--steps", 20)
    told = zowrap_cli("tune", models["encoder"], *options, "--out", whole, "--json")
    assert told.code == 0, told.err
    record = told.json
    assert "choosing the learning rate, with at most 16 evaluations of a training batch" in told.err
    assert f"lr {record['lr']:.2e} chosen for 20 steps with {record['lr_forwards']} forwards" in told.err
    assert record["forwards"] == 40 + record["lr_forwards"] and 0 < record["lr_forwards"] <= 32
    given = zowrap_cli("tune", models["encoder"], *options, "--lr", record["lr"], "--out", tmp_path / "given", "--json")
    assert given.json["lr_forwards"] == 0 and given.json["loss"] == record["loss"]

    smoothed: dict[int, float | None] = {}

    class Stop(progress.Progress):
        stop_at = 9

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            super().on_log(args, state, control, logs, **kwargs)
            smoothed[state.global_step] = self.loss

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.stop_at:
                raise RuntimeError("the machine went down")

    monkeypatch.setattr(progress, "Progress", Stop)
    assert zowrap_cli("tune", models["encoder"], *options, "--out", run).code == 1
    Stop.stop_at = -1
    monkeypatch.setattr(auto_lr, "tune_lr", lambda *args, **kwargs: pytest.fail("chosen again"))
    resumed = zowrap_cli("tune", "--resume", "--out", run, "--json")
    assert resumed.code == 0, resumed.err
    assert f"going on with learning rate {record['lr']:g}, as it was chosen at the first start" in resumed.err
    assert (resumed.json["lr"], resumed.json["forwards"]) == (record["lr"], record["forwards"])
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # What is shown as the smoothed loss goes on, too.
    after = dict(smoothed)
    smoothed.clear()
    monkeypatch.undo()
    monkeypatch.setattr(progress, "Progress", Stop)
    assert zowrap_cli("tune", models["encoder"], *options, "--out", tmp_path / "again").code == 0
    assert after[20] == pytest.approx(smoothed[20], rel=1e-6)


@pytest.mark.slow
def test_the_schedule_that_fits_is_taken_and_a_resumed_run_may_be_given_another(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap import machine
    from zowrap.cli import progress

    class Stop(progress.Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("the machine went down")

    run, config = tmp_path / "run", tmp_path / "run.toml"
    config.write_text('memory = "auto"\nengine = "compiled"\nsteps = 3\nbatch-size = 4\nlr = 1e-3\n')
    monkeypatch.setattr(machine, "free_memory", lambda device=None: 0)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        command = ("tune", models["encoder"], "--data", data["train"], "--config", config, "--out", run)
        told = zowrap_cli(*command)
    assert told.code == 1 and told.out == ""
    said = told.err.splitlines()
    assert [text for text in said if "compiling" in text] == [
        "compiling the training step: about half a minute the first time, kept for the next start"
    ]
    again = tmp_path / "again"
    shutil.copytree(run, again)
    monkeypatch.setattr(machine, "free_memory", lambda device=None: 1 << 50)
    kept = zowrap_cli("tune", "--resume", "--out", run, "--json")
    assert kept.code == 0 and kept.json["memory"] == "sequential" and kept.json["resumed_from"] > 0, kept.err
    other = zowrap_cli("tune", "--resume", "--out", again, "--memory", "paired", "--json")
    assert other.code == 0 and other.json["memory"] == "paired" and other.json["resumed_from"] > 0, other.err
    assert "--memory paired differs from the run's own auto, and is used in its place" in other.err
    assert (run / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_resume_of_nothing_starts_over_and_says_so(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    told = zowrap_cli("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run", "--resume")
    assert told.code == 0 and "starting over" in told.err


def test_a_run_killed_before_its_first_step_goes_on_by_itself(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap.cli import progress

    class Stop(progress.Progress):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        zowrap_cli("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run")
    on = zowrap_cli("tune", "--resume", "--out", tmp_path / "run", "--json")
    assert on.code == 0 and on.json["resumed_from"] == 0 and on.json["steps_run"] == 4, on.err
    assert zowrap_cli("eval", tmp_path / "run", "--data", data["test"]).code == 0


def test_an_interrupted_run_says_how_to_go_on(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from zowrap.cli import progress

    class Press(progress.Progress):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Press)
        told = zowrap_cli("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", run, "--json")
    assert told.code == 130
    assert told.json["steps"] == 3 and f"zowrap tune --resume --out {run}" in told.json["error"]
    on = zowrap_cli("tune", "--resume", "--out", run, "--json")
    assert on.code == 0 and on.json["resumed_from"] == 3 and on.json["steps_run"] == 1


# --- other ways to say it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["toml", "yaml"])
def test_a_config_file_has_the_same_names_and_flags_win(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, ending: str
) -> None:
    lines = [("model", models["encoder"]), ("data", data["train"]), ("learning-rate", 0.002), ("batch_size", 3)]
    lines += [("engine", "eager"), ("out", tmp_path / "run"), ("steps", 9), ("trainable", "*attention*")]
    equals = " = " if ending == "toml" else ": "
    text = "\n".join(f"{k}{equals}{json.dumps(v if isinstance(v, int | float) else str(v))}" for k, v in lines)
    text += "\n[rule-option]\nbeta = 0.5\n" if ending == "toml" else "\nrule-option:\n  beta: 0.5\n"
    file = tmp_path / f"run.{ending}"
    file.write_text(text)
    told = zowrap_cli("tune", "--config", file, "--steps", 2, "--json")
    assert told.code == 0, told.err
    kept = json.loads((tmp_path / "run" / "zowrap.json").read_text())["options"]
    assert (kept["lr"], kept["batch_size"], kept["steps"]) == (0.002, 3, 2)
    assert kept["rule_option"] == ["beta=0.5"] and kept["trainable"] == ["*attention*"]
    header = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
    assert header["hyper"]["beta"] == 0.5 and all("attention" in name for name in header["parameters"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "learning_rat = 1", "unknown option 'learning_rat'"),
        ("a.toml", "stepps = 1", "did you mean 'steps'?"),
        ("a.toml", "steps = ", "not valid TOML"),
        ("a.yaml", "steps: [", "not valid YAML"),
        ("a.yaml", "- steps", "does not hold named options"),
        ("a.toml", "steps = [1]", "takes one value"),
        ("a.toml", "steps = 'many'", "Invalid value for '--steps'"),
        ("a.ini", "", ".toml or .yaml"),
        ("missing.toml", None, "no such configuration file"),
    ],
)
def test_wrong_config_files(zowrap_cli: Cli, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    assert_refused(zowrap_cli("tune", "--config", file), message)


def test_the_trainers_spellings_work(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    told = zowrap_cli(
        "train", models["encoder"], "--data", data["train"], "--engine", "eager", "--learning_rate=0.002",
        "--max-steps", 2, "--output-dir", tmp_path / "run", "--per-device-train-batch-size", 3, "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    assert told.json["steps"] == 2 and told.json["out"] == str(tmp_path / "run")


def test_show_examples_prints_the_mask(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    told = zowrap_cli(
        "tune", models["causal"], "--task", "lm", "--data", data["prompts"], *QUICK, "--out", tmp_path / "run",
        "--show-examples", 1,
    )  # fmt: skip
    lines = told.err.splitlines()
    at = lines.index("example 1:")
    assert lines[at + 1].startswith("  masked  | <s>") and lines[at + 1].endswith("label :")
    assert lines[at + 2] == "  learned | bad </s>"


def test_a_rule_keeps_its_own_way_to_probe(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    from zowrap.rules import get

    for rule, options in (("fzoo", ()), ("fzoo", ("--queries", 3, "--direction", "gaussian")), ("meazo", ())):
        told = zowrap_cli(
            "tune", models["encoder"], "--data", data["train"], *QUICK, "--steps", 1, "--rule", rule, *options,
            "--out", tmp_path / "run", "--overwrite", "--json",
        )  # fmt: skip
        assert told.code == 0, told.err
        header = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
        wanted = get(rule).defaults._replace(**({"queries": 3, "direction": "gaussian"} if options else {}))
        assert (header["direction"], header["estimator"], header["queries"]) == wanted[:3]


def test_a_full_disk_costs_the_picture_and_not_the_run(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from matplotlib.figure import Figure

    def full(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    told = zowrap_cli("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run", "--json")
    assert told.code == 0 and told.json["steps"] == 4
    assert "loss.png is left out: the disk is full" in told.err
    assert not list((tmp_path / "run").glob("*.png"))


def test_the_picture_and_the_metrics(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    zowrap_cli(
        "tune", models["encoder"], "--data", data["train"], "--eval-data", data["test"], "--engine", "eager",
        "--steps", 20, "--batch-size", 4, "--out", run,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "eval_accuracy" in line]
    assert evaluated == list(range(0, 21, 2))
    assert sorted(line["step"] for line in lines if "projected_grad" in line) == list(range(1, 21))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_gets_batches_of_few_lengths_and_a_cpu_none_but_its_own() -> None:
    from types import SimpleNamespace

    from zowrap.cli.tune import _collator
    from zowrap.model.cuda_graphs import MOST
    from zowrap.tasks.batches import Collator

    task = SimpleNamespace(collator=lambda source: Collator(0))
    plan: Any = SimpleNamespace(task=task, source=None, train=SimpleNamespace(lengths=[3, 100, 41]))
    assert _collator(plan, "cpu").lengths == ()
    lengths = _collator(plan, "cuda").lengths
    assert len(lengths) == MOST and lengths[-1] == 100
