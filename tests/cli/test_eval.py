"""``zowrap eval``: a plain model and a run; predictions; wrong input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome, reviews, write_rows

Cli = Callable[..., Outcome]


def test_a_plain_model_needs_no_options(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]) -> None:
    for kind, task in (("encoder", "classification"), ("causal", "classification"), ("causal", "lm")):
        told = zowrap_cli("eval", models[kind], "--task", task, "--data", data["test"], "--json")
        assert told.code == 0, told.err
        assert set(told.json) == {"loss", "accuracy", "accuracy_interval", "examples"}
        low, high = told.json["accuracy_interval"]
        assert low <= told.json["accuracy"] <= high
        assert told.json["examples"] == 10 and 0 <= told.json["accuracy"] <= 1


def test_the_batch_size_does_not_matter(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]) -> None:
    records = [
        zowrap_cli("eval", models["causal"], "--task", "lm", "--data", data["test"], "--batch-size", n, "--json").json
        for n in (1, 3, 64)
    ]
    for record in records[1:]:
        assert record["loss"] == pytest.approx(records[0]["loss"], rel=1e-5)
        assert record["accuracy"] == records[0]["accuracy"]


def test_predictions_are_one_line_per_row(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "predictions.jsonl"
    told = zowrap_cli("eval", models["encoder"], "--data", data["test"], "--predictions", out, "--json")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in reviews(10, seed=1)]
    right = sum(line["label"] == line["prediction"] for line in lines)
    assert right / 10 == pytest.approx(told.json["accuracy"])
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)


def test_predictions_say_which_row_they_are_of(zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    rows = reviews(10, seed=1)
    rows[2] = {"text": "", "label": "bad"}  # nothing to learn from as plain text: left out
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "predictions.jsonl"

    def predicted(*options: object) -> list[dict]:
        told = zowrap_cli("eval", *options, "--data", file, "--predictions", out, "--batch-size", 3)
        assert told.code == 0, told.err
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert [line["row"] for line in predicted(models["causal"], "--task", "lm")] == [0, 1, *range(3, 10)]
    some = predicted(models["encoder"], "--max-eval-examples", 4)
    assert len(some) == 4 and [line["label"] for line in some] == [rows[line["row"]]["label"] for line in some]


def test_people_get_one_line(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]) -> None:
    told = zowrap_cli("eval", models["encoder"], "--data", data["test"])
    assert told.code == 0 and told.out.startswith("loss ") and told.out.count("\n") == 1
    assert re.search(r", accuracy 0\.\d{4} \(95 %: 0\.\d{4} to 0\.\d{4}\), 10 examples$", told.out.strip()), told.out


def test_labels_can_be_named_for_numbers(zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "label": int(row["label"] == "good")} for row in reviews(10, seed=1)]
    numbers = write_rows(tmp_path / "numbers.jsonl", rows)
    words = write_rows(tmp_path / "words.jsonl", reviews(10, seed=1))
    command = ("eval", models["encoder"], "--labels", "bad,good", "--json", "--data")
    assert zowrap_cli(*command, numbers).json == zowrap_cli(*command, words).json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data FILE"),
        (("--data", "nowhere.csv"), "no such file"),
        (("--data", "TEST", "--task", "lmm"), "unknown --task 'lmm'"),
        (("--data", "TEST", "--labels", "great,fine"), "is not one of the labels"),
        (("--data", "TEST", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--data", "TEST", "--head", "words", "--template", "{text}"), "must end with {label}"),
    ],
)
def test_wrong_input(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], arguments: tuple[str, ...], message: str
) -> None:
    told = zowrap_cli("eval", models["encoder"], *(str(data["test"]) if a == "TEST" else a for a in arguments))
    assert told.code == 2 and told.out == "" and message in told.err.splitlines()[-1]


def test_a_run_keeps_its_task(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuned = zowrap_cli(
        "tune", models["causal"], "--data", data["train"], "--engine", "eager", "--steps", 1, "--out", run,
        "--template", "{text} it was {label}",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert zowrap_cli("eval", run, "--data", data["test"], "--json").code == 0
    for arguments, message in (
        (("--task", "lm"), "was tuned for classification"),
        (("--head", "words"), "its own --head"),
    ):
        told = zowrap_cli("eval", run, "--data", data["test"], *arguments)
        assert told.code == 2 and message in told.err
    (run / "model.safetensors").unlink()
    told = zowrap_cli("eval", run, "--data", data["test"])
    assert told.code == 2 and "no finished model yet" in told.err


def test_a_head_that_is_missing_is_an_error_and_no_random_one_is_measured(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]
) -> None:
    told = zowrap_cli("eval", models["encoder"], "--head", "sequence", "--data", data["test"], "--json")
    assert told.code == 2 and "lacks weights that this model has" in told.json["error"]
    assert "classifier.weight" in told.json["error"]
