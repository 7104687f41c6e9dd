"""Folders of adapters: evaluated and merged as peft loads and merges them, extended vocabularies too."""

from __future__ import annotations

import json
import shutil
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


# --- adapters on the hub, and of other names ------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``hub(folder, name)`` puts a folder into the cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def publish(folder: Path, name: str) -> str:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
        return name

    return publish


def test_adapters_of_the_hub_are_evaluated_and_exported(source: Path, tmp_path: Path, hub: Any, zowrap_cli) -> None:
    """The adapters and their base by name; peft saves no tokenizer, and the base's is taken."""
    model = moved("lora", Path(hub(source, "some/base")))
    model.save_pretrained(tmp_path / "adapters")
    assert (
        json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/base"
    )
    name = hub(tmp_path / "adapters", "some/adapters")
    ids = make_tokenizer("causal")(TEXT, return_tensors="pt")["input_ids"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    want = pytest.approx(plain_loss(model, ids), abs=1e-4)
    for place in (tmp_path / "adapters", name):
        assert evaluated(zowrap_cli, place, rows) == want
        to = tmp_path / f"merged-{Path(place).parent.name}"
        assert zowrap_cli("export", place, "--to", to, "--format", "merged").code == 0
        assert evaluated(zowrap_cli, to, rows) == want


def test_adapters_of_the_hub_are_no_start(source: Path, tmp_path: Path, hub: Any, zowrap_cli) -> None:
    moved("lora", Path(hub(source, "some/base"))).save_pretrained(tmp_path / "adapters")
    name = hub(tmp_path / "adapters", "some/adapters")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    told = zowrap_cli("tune", name, "--task", "lm", "--data", rows, "--out", tmp_path / "run")
    assert told.code == 2 and "some/adapters holds adapters" in told.err and not (tmp_path / "run").exists()
    told = zowrap_cli("inspect", name, "--task", "lm")
    assert told.code == 2 and "inspect what they stand on, zowrap inspect some/base --use-peft" in told.err


def named(source: Path, *names: str) -> Any:
    """LoRA under names of its own."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(load_base(source), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def test_adapters_of_another_name_are_evaluated_and_exported(source: Path, tmp_path: Path, zowrap_cli) -> None:
    model = named(source, "mine")
    folder = saved(model, tmp_path / "named")
    assert not (folder / "adapter_model.safetensors").exists() and (folder / "mine").is_dir()
    ids = make_tokenizer("causal")(TEXT, return_tensors="pt")["input_ids"]
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    want = pytest.approx(plain_loss(model, ids), abs=1e-4)
    assert want != plain_loss(load_base(source), ids)
    assert evaluated(zowrap_cli, folder, rows) == want
    for form in ("same", "adapters", "merged", "fp32"):
        assert zowrap_cli("export", folder, "--to", tmp_path / form, "--format", form).code == 0
        assert evaluated(zowrap_cli, tmp_path / form, rows) == want
    again = peft.PeftModel.from_pretrained(load_base(source), tmp_path / "same").eval()
    assert plain_loss(again, ids) == want


def test_a_run_of_an_adapter_of_another_name_ends_with_its_best_model(source: Path, tmp_path: Path, zowrap_cli) -> None:
    from zowrap import ZOConfig, ZOTrainer

    model, ids = named(source, "mine"), [2, 7, 9, 8]
    rows = [{"input_ids": ids, "labels": ids}] * 2
    config = ZOConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, eval_steps=1, save_steps=1, load_best_model_at_end=True, lr=1e-2,
        engine="eager", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    ZOTrainer(model, config, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer("causal")).train()
    file = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    tokens = make_tokenizer("causal")(TEXT, return_tensors="pt")["input_ids"]
    assert evaluated(zowrap_cli, tmp_path / "run", file) == pytest.approx(plain_loss(model, tokens), abs=1e-4)


def test_of_several_adapters_one_is_to_be_named(source: Path, tmp_path: Path, zowrap_cli) -> None:
    model = named(source, "one", "two")
    folder = saved(model, tmp_path / "adapters")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": TEXT}])
    for command in (("eval", folder, "--task", "lm", "--data", rows), ("export", folder, "--to", tmp_path / "to")):
        told = zowrap_cli(*command)
        assert told.code == 2 and "several adapters (one, two)" in told.err
    model.set_adapter("two")
    ids = make_tokenizer("causal")(TEXT, return_tensors="pt")["input_ids"]
    assert evaluated(zowrap_cli, folder / "two", rows) == pytest.approx(plain_loss(model, ids), abs=1e-4)
    default = saved(named(source, "default", "other"), tmp_path / "default")
    told = zowrap_cli("eval", default, "--task", "lm", "--data", rows)
    assert told.code == 0 and "other" in told.err


# --- classification heads beside the adapters -----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize(("kind", "targets"), [("sequence", ["query"]), ("causal", ["q_proj"])])
def test_a_head_beside_the_adapters_is_evaluated_and_merged(kind, targets, task, tmp_path: Path, zowrap_cli) -> None:
    """It has more classes than the head of the base, and only the file of the adapters knows how many."""
    import transformers

    base = make_model(kind, tmp_path / "base", initializer_range=0.3)
    auto = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = auto.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    model.config.pad_token_id = 0
    head = "classifier" if kind == "sequence" else "score"
    beside = {} if task else {"modules_to_save": [head]}
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False, **beside)
    tokenizer = make_tokenizer("bert" if kind == "sequence" else "causal")
    folder = saved(peft.get_peft_model(model, config).eval(), tmp_path / "adapters", tokenizer)
    texts = ["good movie", "the plot was bad", "it was a film"]
    with torch.no_grad():
        logits = torch.cat(
            [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits for text in texts]
        )
    want = pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(3)).item(), abs=1e-4)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text, "label": "abc"[i]} for i, text in enumerate(texts)])
    assert zowrap_cli("export", folder, "--to", tmp_path / "merged", "--format", "merged").code == 0
    for place in (folder, tmp_path / "merged"):
        told = zowrap_cli("eval", place, "--data", rows, "--json")
        assert told.code == 0 and told.json["loss"] == want, told.err
    two = write_rows(tmp_path / "two.jsonl", [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)])
    told = zowrap_cli("eval", folder, "--data", two, "--json")
    assert told.code == 2 and "the 3 classes of the head" in told.json["error"]


def test_pairs_reach_an_adapted_classifier_with_their_types(tmp_path: Path, zowrap_cli) -> None:
    """The forward of peft's wrapper does not name the inputs of its base."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    base = make_model("sequence", tmp_path / "base", initializer_range=0.3)
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(base)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, model_input_names=names)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    folder = saved(model, tmp_path / "adapters", tokenizer)
    pairs = [("good movie", "it was great"), ("a film", "the plot was bad")]
    encoded = [tokenizer(*pair, return_tensors="pt") for pair in pairs]
    assert all(each["token_type_ids"].any() for each in encoded)
    with torch.no_grad():
        logits = torch.cat([model(**each).logits for each in encoded])
    want = torch.nn.functional.cross_entropy(logits, torch.arange(2)).item()
    rows = [{"text": a, "other": b, "label": "ab"[i]} for i, (a, b) in enumerate(pairs)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    told = zowrap_cli("eval", folder, "--data", file, "--text-pair-column", "other", "--json")
    assert told.json["loss"] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_a_model_without_a_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    """transformers makes one of special tokens for some classes, to which all texts are the same."""
    from zowrap.tasks.loading import open_source

    folder = make_model(kind, tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ZOError, match="tokenizer"):
        open_source(str(folder))
