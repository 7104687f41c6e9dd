"""Folders of adapters: evaluated and merged as peft loads and merges them, extended vocabularies too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model, make_tokenizer, write_rows
from tests.support.peft_methods import METHODS, load_base, loss_of
from zowrap.errors import ZOError
from zowrap.step.pretrained import has_adapters
from zowrap.tasks.adapted import load_adapted
from zowrap.tasks.saved_adapters import attach_saved

peft = pytest.importorskip("peft")

TEXT = "the movie was a very good film"
# Kinds that peft itself cannot merge into the weights of their base.
UNMERGED = {
    *("llama adapters", "lily", "beft", "lora with biases"),  # the last two: their layers have no bias
    *("prompt tuning", "p-tuning", "p-tuning with an LSTM", "prefix", "prefix, projected", "context-aware prompt"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    return make_model("causal", tmp_path_factory.mktemp("adapted") / "base", initializer_range=0.3)


def moved(name: str, source: Path, **more: Any) -> Any:
    """The base with adapters of a kind, of which no weight is where peft puts it at first."""
    kind, arguments = METHODS[name]
    arguments = {**arguments, **more}
    for limit in ("trainable_token_indices", "token_indices"):
        if limit in arguments:
            arguments[limit] = [7, 9]
    torch.manual_seed(0)
    model = peft.get_peft_model(load_base(source), getattr(peft, kind)(**arguments)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor)
    return model


def saved(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer("causal")).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_loss(model: Any, ids: torch.Tensor) -> float:
    """The cross-entropy of one text, from the logits: adalora adds to its own loss, and cannot do so after loading."""
    logits = model(input_ids=ids).logits[0]
    prompt = logits.shape[0] - ids.shape[1]  # the last virtual token predicts the first one of the text
    first = 1 if prompt == 0 else 0
    return float(torch.nn.functional.cross_entropy(logits[prompt - 1 + first : -1], ids[0, first:]))


def evaluated(zowrap_cli: Any, folder: Path, rows: Path) -> float:
    told = zowrap_cli("eval", folder, "--task", "lm", "--data", rows, "--json")
    assert told.code == 0, told.err
    assert "freshly" not in told.err
    return told.json["loss"]


@pytest.mark.parametrize("name", [n for n in METHODS if n != "context-aware prompt"])
def test_every_kind_is_evaluated_and_merged_as_by_peft(name: str, source: Path, tmp_path: Path, zowrap_cli) -> None:
    folder = saved(moved(name, source), tmp_path / "adapters")
    ids = make_tokenizer("causal")(TEXT, return_tensors="pt")["input_ids"]
    again = peft.PeftModel.from_pretrained(load_base(source), folder).eval()
    want, plain = plain_loss(again, ids), plain_loss(load_base(source), ids)
    assert abs(want - plain) > 1e-5
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    assert evaluated(zowrap_cli, folder, rows) == pytest.approx(want, abs=1e-4)
    told = zowrap_cli("export", folder, "--to", tmp_path / "merged", "--format", "merged")
    if name in UNMERGED:
        assert told.code == 2 and "--format adapters" in told.err and not (tmp_path / "merged").exists()
        return
    assert told.code == 0, told.err
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert plain_loss(load_base(tmp_path / "merged"), ids) == pytest.approx(
        plain_loss(again.merge_and_unload(), ids), abs=1e-4
    )


def test_a_merge_to_another_precision_is_made_before_it_is_rounded(source: Path, tmp_path: Path, zowrap_cli) -> None:
    folder = saved(moved("dora", source), tmp_path / "adapters")
    for form in ("fp32", "bf16"):
        assert zowrap_cli("export", folder, "--to", tmp_path / form, "--format", form).code == 0
    exact, rounded = load_base(tmp_path / "fp32"), load_base(tmp_path / "bf16")
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16).float(), q), name


def test_a_merge_that_would_change_a_tied_weight_is_refused(tmp_path: Path, zowrap_cli) -> None:
    base = make_model("causal", tmp_path / "base", tie_word_embeddings=True)
    folder = saved(moved("lora on the embedding", base), tmp_path / "adapters")
    told = zowrap_cli("export", folder, "--to", tmp_path / "merged", "--format", "merged")
    assert told.code == 2 and "tied to that of" in told.err and not (tmp_path / "merged").exists()


def test_new_tokens_of_a_tied_embedding_are_merged_in_both_places(tmp_path: Path, zowrap_cli) -> None:
    base = make_model("causal", tmp_path / "base", tie_word_embeddings=True)
    folder = saved(moved("lora and tokens", base), tmp_path / "adapters")
    assert zowrap_cli("export", folder, "--to", tmp_path / "merged", "--format", "merged").code == 0
    ids = torch.tensor([[2, 7, 9, 8]])
    want = peft.PeftModel.from_pretrained(load_base(base), folder).eval()(ids).logits
    assert torch.allclose(load_base(tmp_path / "merged")(ids).logits, want, atol=1e-5)


# --- extended vocabularies ------------------------------------------------------------------------------------------


def extended(source: Path, **arguments: Any) -> tuple[Any, Any]:
    """Adapters on a base with two more tokens, and the tokenizer that has them."""
    tokenizer = make_tokenizer("causal")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    model = load_base(source)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    arguments = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **arguments}
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **arguments)).eval()
    return model, tokenizer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_adapters_of_an_extended_vocabulary_are_loaded_and_merged(tied, arguments, tmp_path, zowrap_cli) -> None:
    source = make_model("causal", tmp_path / "base", initializer_range=0.3, tie_word_embeddings=tied)
    if tied and arguments:
        arguments = {"modules_to_save": ["embed_tokens"]}
    model, tokenizer = extended(source, **arguments)
    folder = saved(model, tmp_path / "adapters", tokenizer)
    text = f"<a> {TEXT} <b>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    want = loss_of(model, input_ids=ids, labels=ids)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text}])
    assert evaluated(zowrap_cli, folder, rows) == pytest.approx(want, abs=1e-4)
    assert zowrap_cli("export", folder, "--to", tmp_path / "merged", "--format", "merged").code == 0
    merged = load_base(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer)
    assert loss_of(merged, input_ids=ids, labels=ids) == pytest.approx(want, abs=1e-4)
    assert evaluated(zowrap_cli, tmp_path / "merged", rows) == pytest.approx(want, abs=1e-4)


def test_an_extended_embedding_without_its_head_is_refused(source: Path, tmp_path: Path) -> None:
    model, tokenizer = extended(source)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lm_head" not in name}, file)
    rows = len(tokenizer)
    with pytest.raises(ZOError, match=f"{rows} tokens for a base of {rows - 2}"):
        attach_saved(load_base(source), tmp_path)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_adapters_of_another_base_are_refused(source: Path, tmp_path: Path) -> None:
    folder = saved(moved("lora", source), tmp_path / "adapters")
    other = make_model("causal", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ZOError, match="do not fit"):
        attach_saved(load_base(make_model("causal", tmp_path / "wide", num_key_value_heads=1)), folder)


def test_missing_weights_of_adapters_are_refused(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(moved("dora", source), tmp_path / "adapters")
    file = folder / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "magnitude" not in name}
    save_file(kept, file)
    with pytest.raises(ZOError, match="magnitude"):
        attach_saved(load_base(source), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_keep_the_bits_that_they_were_saved_with(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = moved("lora", source).to(dtype)
    folder = saved(model, tmp_path / "adapters")
    again = attach_saved(load_base(source, torch.bfloat16), folder)
    stored = load_file(folder / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(again)
    assert stored.keys() == held.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in held.items())


def test_a_classifier_is_loaded_by_the_task_of_its_adapters(source: Path, tmp_path: Path) -> None:
    """The base is a language model, and only the adapters know of the head."""
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    folder = saved(model.eval(), tmp_path / "adapters")
    ids = torch.tensor([[2, 7, 9, 8]])
    again = load_adapted(folder)
    assert has_adapters(again)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
