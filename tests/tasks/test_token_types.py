"""Tokenizers that mark single texts with token types, or pad on the left: the encoding is that of their own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import WORDS, make_model, write_rows
from zowrap.errors import ZOError
from zowrap.tasks.loading import open_source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row

SMALL = {"d_model": 16, "n_head": 2, "d_inner": 32, "n_layer": 2}
TEXTS = ["good movie", "the plot was a very bad one and the film awful", "it was great", "a film"]
LABELS = ["bad", "good"]


TYPED = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}


def make_xlnet(**names: Any) -> tuple[Any, Any]:
    """The tokenizer pads on the left, and ``<cls>`` at the end has the type 2."""
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
    words = [*special, "▁", *(f"▁{word}" for word in WORDS)]
    tokenizer = transformers.XLNetTokenizer([(word, 0.0) for word in words], **names)
    config = transformers.XLNetConfig(vocab_size=len(tokenizer), **SMALL, pad_token_id=tokenizer.pad_token_id)
    return tokenizer, transformers.XLNetForSequenceClassification(config)


def make_funnel(**names: Any) -> tuple[Any, Any]:
    """``<cls>`` at the start has the type 2."""
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"]
    tokenizer = transformers.FunnelTokenizer({word: i for i, word in enumerate([*special, *WORDS])}, **names)
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1], "num_decoder_layers": 1}
    config = transformers.FunnelConfig(vocab_size=len(tokenizer), **sizes, type_vocab_size=3)
    return tokenizer, transformers.FunnelForSequenceClassification(config)


FAMILIES: dict[str, Any] = {
    "xlnet": lambda: make_xlnet(**TYPED),
    "funnel": lambda: make_funnel(**TYPED),
    "xlnet without types": make_xlnet,
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer, model = FAMILIES[request.param]()
    with torch.no_grad():
        for weight in model.parameters():  # their start is too small to tell one encoding from another
            weight.normal_(0, 0.5)
    model.config.id2label, model.config.label2id = dict(enumerate(LABELS)), {"bad": 0, "good": 1}
    model.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def rows(texts: list[str] = TEXTS) -> list[Row]:
    return [Row({"text": text, "label": LABELS[i % 2]}, f"row {i}", i) for i, text in enumerate(texts)]


def test_a_batch_is_the_tokenizers_own(folder: Path) -> None:
    source = open_source(str(folder))
    task, _ = resolve("classification", rows(), source)
    batch = task.collator(source)(task.examples(rows(), source).items)
    want = source.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert {*batch} == {*want, "labels"}
    assert all(torch.equal(batch[name], want[name]) for name in want)


@torch.no_grad()
def test_a_row_has_the_logits_of_the_tokenizers_own_call_alone_and_in_a_batch(folder: Path) -> None:
    source = open_source(str(folder))
    task, _ = resolve("classification", rows(), source)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    want = torch.cat([model(**source.tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    form, collator = task.build(source, torch.float32), task.collator(source)
    items = task.examples(rows(), source).items
    alone = torch.cat([scores(form, collator([item])) for item in items])
    assert torch.allclose(alone, want, atol=1e-5)
    assert torch.allclose(scores(form, collator(items)), want, atol=1e-5)


def scores(form: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return form(**{name: value for name, value in batch.items() if name != "labels"}).logits


def test_types_are_cut_with_their_tokens(folder: Path) -> None:
    source = open_source(str(folder))
    tokenizer = source.tokenizer
    task, _ = resolve("classification", rows(), source, max_length=4)
    for item, text in zip(task.examples(rows(), source).items, TEXTS, strict=True):
        want = tokenizer(text, truncation=True, max_length=4)
        assert all(item[name] == want[name] for name in want if name != "attention_mask")
    own = f"{tokenizer.cls_token} good movie {tokenizer.sep_token}"
    (item,) = task.examples(rows([own]), source).items
    assert len(item["input_ids"]) == len(item.get("token_type_ids", item["input_ids"])) <= 4


def test_a_run_is_tuned_and_evaluated_with_types(folder: Path, tmp_path: Path, zowrap_cli) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row.values for row in rows()])
    quick = ("--steps", 2, "--batch-size", 4, "--lr", "1e-4", "--engine", "eager", "--out", tmp_path / "run", "--json")
    told = zowrap_cli("tune", folder, "--data", data, *quick)
    assert told.code == 0, told.err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    want = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])).item()
    for size in (1, 4):
        told = zowrap_cli("eval", tmp_path / "run", "--data", data, "--batch-size", size, "--json")
        assert told.json["loss"] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("folder", ["xlnet", "funnel"], indirect=True)
def test_forms_that_know_no_types_refuse_them(folder: Path) -> None:
    source = open_source(str(folder))
    task, _ = resolve("classification", rows(), source, head="words")
    with pytest.raises(ZOError, match="types of their own, which --head words would leave out"):
        task.examples(rows(), source)


def test_types_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    source = open_source(str(make_model("sequence", tmp_path / "bert")))
    task, _ = resolve("classification", rows(), source)
    assert set(task.examples(rows(), source).items[0]) == {"input_ids", "labels"}
