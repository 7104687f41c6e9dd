"""Named selections of what moves."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as T
from torch import nn

import zowrap
from tests.support.families import FAMILIES, LLAMA, batch, make
from tests.support.quantized_models import quantized
from zowrap.errors import ZOError
from zowrap.step import selections


def names_of(model: nn.Module, trainable) -> list[str]:
    return [p.name for p in zowrap.zo_wrap(model, trainable=trainable, engine="eager").parameters]


LAST = {
    "llama": ("model.layers.1.", "model.norm.", None),  # the tied head is the embedding, which stays
    "qwen2": ("model.layers.1.", "model.norm.", "lm_head."),
    "opt": ("model.decoder.layers.1.", "model.decoder.final_layer_norm.", None),
    "gpt2": ("transformer.h.1.", "transformer.ln_f.", None),
    "bert": ("bert.encoder.layer.1.", "bert.pooler.", "classifier."),
    "roberta": ("roberta.encoder.layer.1.", "classifier.", None),
    "distilbert": ("distilbert.transformer.layer.1.", "pre_classifier.", "classifier."),
    "t5": ("decoder.block.1.", "decoder.final_layer_norm.", None),
}


@pytest.mark.parametrize("family", LAST)
def test_the_last_layer_goes_with_what_follows_it(family: str) -> None:
    model = make(family)
    asked = tuple(prefix for prefix in LAST[family] if prefix)
    everything = names_of(model, None)
    assert names_of(model, "last:1") == [name for name in everything if name.startswith(asked)]
    both = names_of(model, "last:2")
    assert set(names_of(model, "last:1")) < set(both) and not any("embed" in name or "wte" in name for name in both)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_all_of_them(family: str) -> None:
    model = make(family)
    norms = {name for name in names_of(model, None) if "norm" in name.lower() or ".ln_" in name}
    assert set(names_of(model, "norms")) == norms
    biases = [name for name in names_of(model, None) if name.endswith("bias")]
    if biases:
        assert names_of(model, "biases") == biases
    else:
        with pytest.raises(ZOError, match=r"'biases' finds none of its weights \(every bias\).*has: .*norms.*last:N"):
            names_of(model, "biases")


VALUES = {
    "llama": "self_attn.v_proj.",
    "opt": "self_attn.v_proj.",
    "phi": "self_attn.v_proj.",
    "gpt2": "attn.c_attn.",  # one matrix for queries, keys and values
    "bert": "attention.self.value.",
    "distilbert": "attention.v_lin.",
    "t5": "Attention.v.",
}


@pytest.mark.parametrize("family", VALUES)
def test_value_projections_are_found_in_attention(family: str) -> None:
    model = make(family)
    found = names_of(model, "values")
    assert found == [name for name in names_of(model, None) if VALUES[family] in name]
    stack = LAST.get(family, ("model.layers.1.",))[0]
    assert names_of(model, "late-values") == [name for name in found if name.startswith(stack)]


class Rwkv(nn.Module):
    """Its feed-forward has a matrix called value, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"value": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
        self.feed_forward = nn.ModuleDict({"value": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.feed_forward["value"](self.attention["value"](x))


def test_a_value_outside_attention_is_none() -> None:
    assert names_of(Rwkv(), "values") == ["attention.value.weight", "attention.value.bias"]


def test_torchs_own_attention_has_them_in_one_matrix() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    assert names_of(model, "values") == [
        f"layers.{i}.self_attn.in_proj_{kind}" for i in range(2) for kind in ("weight", "bias")
    ]
    assert set(names_of(model, "norms")) == {
        f"layers.{i}.norm{n}.{kind}" for i in range(2) for n in (1, 2) for kind in ("weight", "bias")
    }


def test_selections_and_patterns_go_together() -> None:
    model = make("llama")
    found = names_of(model, ["norms", "layers.0.*.v_proj"])
    assert set(found) == {*names_of(model, "norms"), "model.layers.0.self_attn.v_proj.weight"}


def test_of_a_model_with_adapters_only_these_move() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make("llama"), config)
    assert names_of(model, "values") == [
        f"model.layers.{i}.self_attn.v_proj.lora_{part}.weight" for i in range(2) for part in "AB"
    ]
    assert all("layers.1." in name and "lora_" in name for name in names_of(model, "last:1"))


@pytest.mark.parametrize("mode", ["scales", "codes", "adapters"])
def test_of_a_quantised_model_the_form_that_moves_does(mode: str) -> None:
    model = quantized("llama")
    zm = zowrap.zo_wrap(model, trainable=["last:1"], quantized=mode, engine="eager")
    parts = {"scales": "log_scale", "codes": "weight", "adapters": "lora_"}[mode]
    found = [p.name for p in zm.parameters]
    assert any(parts in name for name in found) and any("layers.1." in name for name in found)
    assert not any("layers.0." in name or "embed" in name for name in found)
    assert mode != "adapters" or all("layers.1." in name for name in found)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("last:3", "the model has 2 layers in model.layers"),
        ("last:0", "number of layers from 1"),
        ("last:two", "number of layers from 1"),
        ("last:N", "number of layers from 1"),
        ("late_values", r"none of the named selections \(values, late-values, norms, biases, last:N\)"),
    ],
)
def test_what_is_no_selection_is_refused(word: str, message: str) -> None:
    with pytest.raises(ZOError, match=message):
        names_of(make("llama"), word)


def test_a_model_without_layers_has_no_last_ones() -> None:
    with pytest.raises(ZOError, match="found no numbered layers"):
        names_of(nn.Linear(3, 2), "last:1")
    with pytest.raises(ZOError, match=r"'norms' finds none of its weights.*has: biases"):
        names_of(nn.Linear(3, 2), "norms")


def test_a_module_of_the_same_name_is_not_guessed_at() -> None:
    model = nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(3)]), "other": nn.LayerNorm(3)})
    with pytest.raises(ZOError, match=r"named selection .* module of that name: write '\*\.norms\.\*'"):
        names_of(model, "norms")
    assert names_of(model, "norms.*") == ["norms.0.weight", "norms.0.bias"]


def test_inspect_says_what_was_selected() -> None:
    zm = zowrap.zo_wrap(make("llama"), trainable=["late-values", "last:1"], engine="eager")
    report = zm.inspect()
    assert report.selected == [
        "late-values: the value projections in the upper half of the layers",
        "last:1: the last layer and what follows them, but no embeddings",
    ]
    assert "selected   late-values: the value" in str(report) and report.as_dict()["selected"] == report.selected


def test_only_the_selected_weights_train() -> None:
    model = make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-2, trainable="late-values", engine="eager")
    zm.step(**batch("llama", 3, 8))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"model.layers.1.self_attn.v_proj.weight"}


def test_where_no_adapter_lies_nothing_else_moves_instead() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ZOError, match=r"trainable='values'.*no adapter lies there"):
        names_of(peft.get_peft_model(make("llama"), config), "values")


def test_of_an_encoder_and_a_smaller_decoder_the_decoders_layers_are_the_last() -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = T.BartConfig(**sizes, **heads, encoder_layers=6, decoder_layers=2)
    model = T.BartForConditionalGeneration(config)
    assert all(name.startswith("model.decoder.layers.1.") for name in names_of(model, "last:1"))
    assert all("decoder.layers.1." in name and "v_proj" in name for name in names_of(model, "late-values"))


def test_a_head_of_several_layers_follows_the_stack() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.head = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))

    found = names_of(Own(), "last:1")
    assert found == [f"{name}.{kind}" for name in ("layers.2", "head.0", "head.2") for kind in ("weight", "bias")]


def test_of_a_model_for_pictures_and_words_the_language_layers_are_the_last() -> None:
    text = {**LLAMA, "hidden_size": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**text), vision_config=T.CLIPVisionConfig(**vision, image_size=8, patch_size=4)
    )
    found = names_of(T.LlavaForConditionalGeneration(config), "last:1")
    assert all(
        name.startswith(("model.language_model.layers.1.", "model.language_model.norm", "lm_head")) for name in found
    )


def test_a_predicate_and_no_selection_pass() -> None:
    model = make("llama")

    def chosen(name: str, tensor: torch.Tensor) -> bool:
        return "norm" in name

    assert selections.expand(model, chosen) is chosen and selections.expand(model, None) is None
    assert selections.expand(model, "layers.1") == "layers.1" and selections.describe(chosen) == []
