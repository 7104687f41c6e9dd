"""``zowrap eval``: a plain model and a run; predictions; wrong input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome, make_model, reviews, write_rows

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


# --- labels and heads ---------------------------------------------------------------------------------------------


def rated(folder: Path, labels: int = 3, **options: object) -> Path:
    """A classification head whose outputs differ from text to text."""
    return make_model("sequence", folder, num_labels=labels, initializer_range=2.0, **options)


def predicted(zowrap_cli: Cli, model: Path, file: Path, *options: object) -> list[str]:
    out = file.with_suffix(".out")
    told = zowrap_cli("eval", model, "--data", file, "--predictions", out, *options)
    assert told.code == 0, told.err
    return [json.loads(line)["prediction"] for line in out.read_text().splitlines()]


def test_a_number_means_the_same_class_in_every_file(zowrap_cli: Cli, tmp_path: Path) -> None:
    model, rows = rated(tmp_path / "model"), reviews(30, seed=2)
    whole = write_rows(tmp_path / "whole.jsonl", [{**row, "label": i % 3} for i, row in enumerate(rows)])
    answers = predicted(zowrap_cli, model, whole)
    assert len(set(answers)) > 1
    for kept in ({"0"}, {"1"}, {"2"}, {"1", "2"}, {"0", "2"}):
        own = [{**row, "label": int(found)} for row, found in zip(rows, answers, strict=True) if found in kept]
        if own:
            told = zowrap_cli("eval", model, "--data", write_rows(tmp_path / "some.jsonl", own), "--json")
            assert told.json["accuracy"] == 1.0 and "freshly" not in told.err, told


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0], ["a", "b"], ["a", "b", "LABEL_1"]])
def test_a_trained_head_is_never_replaced_to_evaluate(zowrap_cli: Cli, tmp_path: Path, labels: list) -> None:
    rows = [{"text": "good movie", "label": label} for label in labels]
    told = zowrap_cli("eval", rated(tmp_path / "model"), "--data", write_rows(tmp_path / "a.jsonl", rows))
    assert told.code == 2 and "are not the 3 classes of the head" in told.err and "--labels" in told.err, told.err


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("BertForMaskedLM", "classifier.weight"), ("BertForTokenClassification", "pooler.dense.weight")],
)
def test_random_weights_are_not_evaluated(
    zowrap_cli: Cli, data: dict[str, Path], tmp_path: Path, name: str, lacking: str
) -> None:
    import transformers

    make_model("encoder", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    told = zowrap_cli("eval", tmp_path, "--data", data["test"], "--head", "sequence")
    assert told.code == 2 and "lacks weights" in told.err and lacking in told.err
    told = zowrap_cli("eval", tmp_path, "--data", data["test"], "--head", "sentence")  # has no use for the pooler
    assert told.code == 0, told.err


def test_pairs_are_scored_as_the_tokenizer_joins_them(zowrap_cli: Cli, tmp_path: Path) -> None:
    import torch
    import transformers
    from tokenizers.processors import TemplateProcessing

    model = rated(tmp_path / "model", 2)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(model)
    rows = [{"a": one["text"], "b": two["text"], "label": i % 2}
            for i, (one, two) in enumerate(zip(reviews(20), reviews(20, seed=3), strict=True))]  # fmt: skip
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        inputs = [tokenizer(row["a"], row["b"], return_tensors="pt") for row in rows]
        assert any(each["token_type_ids"].any() for each in inputs)
        logits = torch.cat([whole(**each).logits for each in inputs])
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    command = ("eval", model, "--data", file, "--text-column", "a", "--text-pair-column", "b", "--json")
    want = torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"] for row in rows])).item()
    assert zowrap_cli(*command).json["loss"] == pytest.approx(want, abs=1e-5)
    cut = zowrap_cli(*command, "--max-length", 8)
    assert cut.code == 0 and "rows were longer than 8 tokens and cut" in cut.err and cut.json["loss"] != want
    told = zowrap_cli(*command[:-2], "c")
    assert told.code == 2 and "has no column 'c'" in told.err and "--text-pair-column" in told.err
    run = tmp_path / "run"
    options = ("--text-column", "a", "--text-pair-column", "b", "--engine", "eager", "--steps", 2, "--lr", "1e-9")
    assert zowrap_cli("tune", model, "--data", file, *options, "--out", run).code == 0
    assert zowrap_cli("eval", run, "--data", file, "--json").json["loss"] == pytest.approx(want, abs=1e-4)


def test_numbers_ask_for_names_where_names_are_compared(
    zowrap_cli: Cli, models: dict[str, Path], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{**row, "label": i % 2} for i, row in enumerate(reviews(6))])
    for model in (models["encoder"], models["causal"]):
        told = zowrap_cli("eval", model, "--data", file)
        assert told.code == 0 and "warning: the labels are numbers (0, 1)" in told.err and "--labels" in told.err
    told = zowrap_cli("eval", models["encoder"], "--data", file, "--labels", "bad,good")
    assert told.code == 0 and "warning" not in told.err
    ones = write_rows(tmp_path / "b.jsonl", [{"text": "good", "label": 1}, {"text": "bad", "label": 2}])
    told = zowrap_cli("eval", models["encoder"], "--data", ones, "--labels", "bad,good,great")
    assert "warning: no row has the label 0" in told.err


def test_a_length_beyond_the_models_is_told(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]) -> None:
    told = zowrap_cli("eval", models["encoder"], "--data", data["test"], "--max-length", 4096)
    assert "--max-length 4096 is cut to the 32 tokens that the model reads" in told.err


def test_a_head_that_is_missing_is_an_error_and_no_random_one_is_measured(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path]
) -> None:
    told = zowrap_cli("eval", models["encoder"], "--head", "sequence", "--data", data["test"], "--json")
    assert told.code == 2 and "lacks weights that this model has" in told.json["error"]
    assert "classifier.weight" in told.json["error"]
