"""Special tokens once, and no token that the model does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.conftest import make_model, make_tokenizer
from zowrap.errors import ZOError
from zowrap.tasks.encoding import check_vocabulary, encode
from zowrap.tasks.lm import LanguageModelling
from zowrap.tasks.loading import Source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row


def tokens(kind: str, text: str) -> list[str]:
    tokenizer = make_tokenizer(kind)
    return tokenizer.convert_ids_to_tokens(encode(tokenizer, text))


@pytest.mark.parametrize(
    ("kind", "text", "want"),
    [
        ("causal", "good movie", "<s> good movie"),
        ("causal", "<s> good movie", "<s> good movie"),
        ("causal", " <s>good movie</s>", "<s> good movie </s>"),
        ("causal", "good <s> movie", "<s> good <s> movie"),
        ("causal", "", "<s>"),
        ("causal", "<s>", "<s>"),
        ("bert", "good", "[CLS] good [SEP]"),
        ("bert", "[CLS] good [SEP]", "[CLS] good [SEP]"),
        ("bert", "[CLS] good", "[CLS] good [SEP]"),
        ("bert", "good [SEP]", "[CLS] good [SEP]"),
        ("bert", "good [SEP] bad", "[CLS] good [SEP] bad [SEP]"),
    ],
)
def test_a_special_token_stands_once(kind: str, text: str, want: str) -> None:
    assert tokens(kind, text) == want.split()


def test_prompts_and_classes_have_one_beginning() -> None:
    source = Source(
        "tiny", LlamaConfig(vocab_size=99, architectures=["LlamaForCausalLM"]), make_tokenizer("causal"), empty=True
    )
    row = Row({"prompt": "<s> the movie", "completion": " was good </s>"}, "row 1")
    (item,) = LanguageModelling("prompt", "text", 64).examples([row], source).items
    shown = source.tokenizer.convert_ids_to_tokens(item["input_ids"])
    assert shown == ["<s>", "the", "movie", "was", "good", "</s>"] and item["labels"][:3] == [-100] * 3
    rows = [Row({"text": "<s> movie", "label": label}, "") for label in ("good", "bad")]
    task, _ = resolve("classification", rows, source)
    shown = source.tokenizer.convert_ids_to_tokens(task.examples(rows, source).items[0]["input_ids"])
    assert shown == ["<s>", "movie", "<unk>", ":"]


def small(vocabulary: int | None, **special: Any) -> Source:
    tokenizer = make_tokenizer("causal")
    tokenizer.add_special_tokens(special)
    size = len(tokenizer) if vocabulary is None else vocabulary
    return Source("tiny", LlamaConfig(vocab_size=size, architectures=["LlamaForCausalLM"]), tokenizer, empty=True)


def test_a_token_without_an_embedding_is_refused_with_both_sizes() -> None:
    before = len(make_tokenizer("causal"))
    source = small(before, additional_special_tokens=["<|user|>"])
    rows = [Row({"text": text, "label": label}, f"f line {i}") for i, (text, label) in
            enumerate([("good movie", "good"), ("<|user|> bad", "bad")], 1)]  # fmt: skip
    sentence = rf"f line 2 has the token '<\|user\|>'.*has {before + 1} tokens and the model an embedding of {before}"
    with pytest.raises(ZOError, match=sentence):
        LanguageModelling("text", "text", 64).examples(rows, source)
    task, _ = resolve("classification", rows, source)
    with pytest.raises(ZOError, match=sentence):
        task.examples(rows, source)
    task, _ = resolve("classification", rows, source, labels=["good", "bad <|user|>", "bad"])
    with pytest.raises(ZOError, match=r"label 'bad <\|user\|>' has the token"):
        task.label_words(source)
    LanguageModelling("text", "text", 64).examples(rows, small(None, additional_special_tokens=["<|user|>"]))
    check_vocabulary(rows, [[10**6], []], Source("tiny", None, source.tokenizer))  # a size that is not known


def test_a_pad_token_without_an_embedding_does_no_harm() -> None:
    size = len(make_tokenizer("causal"))
    added, embedded = small(size, pad_token="<pad>"), small(None, pad_token="<pad>")
    assert added.tokenizer.pad_token_id == size and added.pad_id == added.tokenizer.eos_token_id
    assert embedded.pad_id == embedded.tokenizer.pad_token_id
    rows = [Row({"text": text}, "") for text in ("good", "good movie was bad")]
    task = LanguageModelling("text", "text", 64)
    batch = task.collator(added)(task.examples(rows, added).items)
    assert batch["input_ids"].max() < size and batch["attention_mask"].sum() == 2 + 5


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_adapters_may_bring_a_larger_embedding(tmp_path: Path, options: dict[str, Any]) -> None:
    import peft

    base = make_model("causal", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapters")
    config, text = AutoConfig.from_pretrained(base), [Row({"text": "<|user|> good"}, "row 1")]
    assert Source(str(tmp_path / "adapters"), config, tokenizer).vocabulary_size == before + 1
    LanguageModelling("text", "text", 64).examples(text, Source(str(tmp_path / "adapters"), config, tokenizer))
    with pytest.raises(ZOError, match=f"has {before + 1} tokens and the model an embedding of {before}"):
        LanguageModelling("text", "text", 64).examples(text, Source(str(base), config, tokenizer))
