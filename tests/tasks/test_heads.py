"""Heads are known by the tensors in the file; a trained head's own numbering decides what a label means."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import make_tokenizer
from zowrap.errors import ZOError
from zowrap.tasks.classification import choose_form
from zowrap.tasks.heads import Numbering, identify, match_given, match_labels
from zowrap.tasks.loading import Source, open_source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = {
    "BertForSequenceClassification": "sequence",
    "BertForMaskedLM": "masked",
    "BertForPreTraining": "masked",
    "BertModel": "base",
    "BertForTokenClassification": "other",
    "BertForQuestionAnswering": "other",
    "BertForMultipleChoice": "other",
    "BertForNextSentencePrediction": "other",
    "RobertaForSequenceClassification": "sequence",
    "RobertaForMaskedLM": "masked",
    "RobertaForTokenClassification": "other",
    "LlamaForCausalLM": "causal",
    "LlamaForSequenceClassification": "sequence",
    "LlamaForTokenClassification": "other",
    "LlamaModel": "base",
}


def save(name: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    kind = name.split("For")[0].removesuffix("Model")
    tokenizer = make_tokenizer("causal" if kind == "Llama" else "bert")
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **SMALL, **options)
    getattr(transformers, name)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def declare(folder: Path, *architectures: str) -> Source:
    """The folder with other words about its class in the configuration, or none."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings.pop("architectures", None)
    file.write_text(json.dumps({**settings, **({"architectures": list(architectures)} if architectures else {})}))
    return open_source(str(folder))


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_checkpoint_is_known_with_and_without_its_configuration(name: str, kind: str, tmp_path: Path) -> None:
    source = open_source(str(save(name, tmp_path)))
    assert identify(source).kind == kind and identify(source).name == name
    found = identify(declare(tmp_path))
    assert found.kind == kind, found


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_language_model_is_known_if_its_head_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    save("LlamaForCausalLM", tmp_path, tie_word_embeddings=tied)
    assert identify(declare(tmp_path)).name == "LlamaForCausalLM"
    assert identify(declare(tmp_path, "LlamaModel")).name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("held", "declared", "kind"),
    [
        ("BertForSequenceClassification", "BertModel", "sequence"),
        ("BertForSequenceClassification", "BertForMaskedLM", "sequence"),
        ("LlamaForSequenceClassification", "LlamaForCausalLM", "sequence"),
        ("BertForMaskedLM", "BertForSequenceClassification", "masked"),
        ("BertModel", "BertForMaskedLM", "base"),
        ("BertForMaskedLM", "BertModel", "masked"),
    ],
)
def test_the_file_decides_against_the_configuration(
    held: str, declared: str, kind: str, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    found = identify(declare(save(held, tmp_path), declared))
    assert found.kind == kind and found.name == held
    assert held in told.text and f"calls it a {declared}" in told.text


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "other"])
def test_a_head_for_something_else_is_not_dropped_in_silence(name: str, tmp_path: Path) -> None:
    for source in (open_source(str(save(name, tmp_path))), declare(tmp_path)):
        with pytest.raises(ZOError, match=f"is a {name}, whose head is for something else: --head sequence"):
            choose_form(source)
        assert choose_form(source, "sequence")[0] == "sequence"


def test_a_new_head_takes_nothing_of_one_for_something_else(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    source = open_source(str(save("BertForTokenClassification", tmp_path, num_labels=2)))
    rows = [Row({"text": "good", "label": label}, "") for label in ("a", "b")]
    task, _ = resolve("classification", rows, source, head="sequence")
    heads = [task.build(source, torch.float32, seed).module.classifier.weight for seed in (1, 1, 2)]
    trained = transformers.BertForTokenClassification.from_pretrained(tmp_path).classifier.weight
    assert not heads[0].equal(trained) and heads[0].equal(heads[1]) and not heads[0].equal(heads[2])
    assert "trained for something else: classifier" in told.text


def test_what_language_modelling_does_not_use_is_told(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    source = open_source(str(save("LlamaForSequenceClassification", tmp_path)))
    resolve("lm", [Row({"text": "good"}, "")], source)
    assert "is a LlamaForSequenceClassification: its head is not used" in told.text


# --- which class a label means ---------------------------------------------------------------------------------------

PLAIN, STARS, NAMED = ["LABEL_0", "LABEL_1", "LABEL_2"], ["1 star", "2 stars", "3 stars"], ["NEG", "MID", "POS"]
FOLDER = Source("folder", None, None)


def match(found: list[str], own: list[str], keep: bool = True) -> Numbering | None:
    booleans = {"false": 0, "true": 1}
    numbers = {
        booleans[name] if name in booleans else int(name) for name in found if name in booleans or name.isdigit()
    }
    return match_labels(found, numbers if len(numbers) == len(found) else set(), own, FOLDER, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("found", "own", "labels", "numbers"),
    [
        (["0", "1", "2"], PLAIN, ["0", "1", "2"], None),
        (["1", "2"], PLAIN, ["0", "1", "2"], None),
        (["0"], PLAIN, ["0", "1", "2"], None),
        (["LABEL_2", "LABEL_0"], PLAIN, PLAIN, None),
        (["1", "2", "3"], STARS, STARS, [1, 2, 3]),
        (["1", "2"], STARS, STARS, [1, 2, 3]),
        (["3"], STARS, STARS, [1, 2, 3]),
        (["0", "2"], NAMED, NAMED, None),
        (["pos", "neg"], NAMED, ["neg", "MID", "pos"], None),
        (["false", "true"], ["NO", "YES"], ["NO", "YES"], None),
        (["2", "1"], ["1", "2", "3"], ["1", "2", "3"], None),
        (["1", "0"], ["class 0", "class 1"], ["class 0", "class 1"], None),
    ],
)
def test_a_label_means_the_same_class_in_every_file(
    found: list[str], own: list[str], labels: list[str], numbers: list[int] | None, keep: bool
) -> None:
    got = match(found, own, keep)
    assert got is not None and got.labels == labels and got.numbers == numbers


@pytest.mark.parametrize(
    ("found", "own"),
    [
        (["0", "1", "3"], PLAIN),
        (["1", "2", "3"], NAMED),
        (["9"], STARS),
        (["a", "b"], PLAIN),
        (["a", "b"], NAMED),
        (["NEG", "other", "POS"], NAMED),
    ],
)
def test_evaluating_refuses_labels_that_the_head_does_not_have(found: list[str], own: list[str]) -> None:
    with pytest.raises(ZOError, match=r"are not the 3 classes of the head of folder .*--labels"):
        match(found, own)


@pytest.mark.parametrize("keep", [True, False])
def test_what_could_be_two_numberings_is_asked(keep: bool) -> None:
    for found in (["0", "1", "2"], ["0", "3"], ["0"]):
        with pytest.raises(ZOError, match="--labels 1 star,2 stars,3 stars reads them as positions"):
            match(found, STARS, keep)
    with pytest.raises(ZOError, match="are not the 3 classes"):
        match(["NEG", "mid?", "other"], NAMED, keep)


@pytest.mark.parametrize(("found", "own"), [(["a", "b"], PLAIN), (["0", "1", "2", "3"], NAMED), (["9"], PLAIN)])
def test_tuning_gives_other_classes_a_new_head(found: list[str], own: list[str]) -> None:
    assert match(found, own, keep=False) is None


def test_a_guess_is_told(told: pytest.LogCaptureFixture) -> None:
    assert match(["x", "y", "z"], PLAIN) == Numbering(["x", "y", "z"], False)
    assert "3 classes without names: they are taken to be, in this order, the data's labels 'x', 'y', 'z'" in told.text
    match(["x", "y", "z"], NAMED)
    assert "has the classes 'NEG', 'MID', 'POS'" in told.text
    match(["1", "2"], STARS)
    assert "1 is '1 star', 2 is '2 stars'" in told.text and told.text.count("WARNING") == 3
    told.clear()
    match(["2", "0"], NAMED)
    assert "0 is 'NEG', 1 is 'MID', 2 is 'POS'" in told.text


@pytest.mark.parametrize(
    ("given", "own", "want"),
    [
        (NAMED, NAMED, Numbering(NAMED, True)),
        (["pos", "mid", "neg"], NAMED, Numbering(["neg", "mid", "pos"], True, [2, 1, 0])),
        (["POS", "NEG"], NAMED, Numbering(NAMED, True, [1, None, 0])),
        (["bad", "so so", "good"], NAMED, Numbering(["bad", "so so", "good"], True)),
        (["a", "b", "c"], PLAIN, Numbering(["a", "b", "c"], True)),
    ],
)
def test_names_from_the_user_keep_the_order_of_the_head(given: list[str], own: list[str], want: Numbering) -> None:
    assert match_given(given, own, FOLDER, keep=True) == want


def test_names_from_the_user_that_contradict_the_head_are_refused() -> None:
    with pytest.raises(ZOError, match="contradicts the head of folder"):
        match_given(["POS", "x", "y"], NAMED, FOLDER, keep=False)
    with pytest.raises(ZOError, match="names 2 labels, and the head of folder has 3 classes"):
        match_given(["a", "b"], NAMED, FOLDER, keep=True)
    assert match_given(["a", "b"], NAMED, FOLDER, keep=False) is None
    assert match_given(["NEG", "POS"], NAMED, FOLDER, keep=False) is None  # a new head of two


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("zowrap"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def test_many_classes_in_few_rows_are_no_ids_where_the_head_knows_them(tmp_path: Path) -> None:
    names = {i: f"intent {i}" for i in range(30)}
    source = open_source(str(save("BertForSequenceClassification", tmp_path, id2label=names)))
    rows = [Row({"text": "good", "label": name, "id": str(1000 + i)}, "") for i, name in names.items()]
    task, _ = resolve("classification", rows, source)
    assert task.labels == list(names.values())
    with pytest.raises(ZOError, match="each of the 30 rows has a label of its own in column 'id', as if it held ids"):
        resolve("classification", [*rows], source, label_column="id", head="sentence")
