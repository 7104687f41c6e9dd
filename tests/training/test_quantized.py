"""Quantised runs on the disk: checkpoints, the trainer, replay, export."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn

import zowrap
from tests.support.families import batch
from tests.support.quantized_models import SCHEMES, logits, plain, quantized
from zowrap import quant
from zowrap.errors import ZOError
from zowrap.model.zo_model import ZOModel
from zowrap.numerics import codes
from zowrap.ops import codes as code_operators
from zowrap.quant import lowering, merge
from zowrap.step.pretrained import has_adapters
from zowrap.storage import compare
from zowrap.storage.export import export_run
from zowrap.storage.merge import export_merged
from zowrap.tasks.adapted import load_adapted
from zowrap.training.checkpoint import load_checkpoint, load_weights
from zowrap.training.config import ZOConfig
from zowrap.training.replay import replay_run
from zowrap.training.run_folder import Run
from zowrap.training.trainer import ZOTrainer


def wrap(way: str, engine: str = "eager") -> ZOModel:
    return zowrap.zo_wrap(quantized("opt"), "meazo", lr=1e-2, quantized=way, engine=engine, seed=3)


@pytest.mark.parametrize(
    "way, engine",
    [
        ("scales", "eager"),
        ("codes", "eager"),
        ("adapters", "eager"),
        pytest.param("scales", "compiled", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_same_weights(way: str, engine: str, tmp_path) -> None:
    inputs = batch("opt", 4, 9)
    whole = wrap(way, engine)
    for _ in range(2):
        whole.step(**inputs)
    checkpoint = Run(tmp_path).save_checkpoint(2, whole, {})
    whole.step(**inputs)
    resumed = wrap(way, engine)
    load_checkpoint(checkpoint, resumed)
    resumed.step(**inputs)
    for p, q in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(p.tensor, q.tensor), p.name


def test_scales_are_taken_from_a_saved_model(tmp_path) -> None:
    zm, other = wrap("scales"), wrap("scales")
    zm.update(projected_grad=torch.tensor(1.0))
    zm.save_pretrained(str(tmp_path))
    load_weights(tmp_path, other)
    for p, q in zip(zm.parameters, other.parameters, strict=True):
        assert torch.allclose(p.tensor, q.tensor, atol=1e-6)


def test_what_writes_codes_is_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dummy run at every step would be a dozen launches for nothing."""
    made, calls = code_operators.warm, []
    monkeypatch.setattr(code_operators, "warm", lambda *given: calls.append(given) or made(*given))
    zm = wrap("codes", "compiled")
    for _ in range(3):
        zm.update(projected_grad=torch.tensor(1.0))
    assert len(calls) == 1


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in batch("opt", 1, 7, seed=i).items()}


@pytest.mark.parametrize("way", ["scales", "codes"])
def test_the_trainer_takes_a_purely_quantised_model_and_its_run_is_replayed(way: str, tmp_path) -> None:
    model = quantized("opt")
    args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, lr="1e-2", rule="meazo",
                    quantized=way, engine="eager", report_to="none", per_device_train_batch_size=4)  # fmt: skip
    trainer = ZOTrainer(model, args, train_dataset=Rows())
    trainer.train()
    assert model.is_quantized
    inputs = batch("opt", 4, 9)
    tuned = logits(model, inputs)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "run"), inputs), tuned)
    zm = replay_run(quantized("opt"), tmp_path / "run")
    for p, q in zip(zm.parameters, trainer.zm.parameters, strict=True):
        assert torch.equal(p.tensor, q.tensor), p.name
    with pytest.raises(ZOError, match="other weights"):
        replay_run(_other(quantized("opt")), tmp_path / "run")


def _other(model: nn.Module) -> nn.Module:
    for layer in quant.lower(model).values():
        layer.SCB.mul_(2)
    quant.raise_back(model)
    return model


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4 twice"])
@pytest.mark.parametrize("form, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_dequantised_checkpoints_are_plain_ones(scheme: str, form: str, dtype: torch.dtype, tmp_path) -> None:
    model = quantized("llama", scheme)
    model.save_pretrained(tmp_path / "model")
    export_run(tmp_path / "model", tmp_path / "plain", form=form)
    other: Any = type(model).from_pretrained(tmp_path / "plain")
    assert other.dtype == dtype and not getattr(other, "is_quantized", False)
    weight = other.model.layers[0].mlp.up_proj.weight.float()
    exact = plain("llama").model.layers[0].mlp.up_proj.weight
    assert (weight - exact).norm() < (0.02 if scheme == "int8" else 0.2) * exact.norm()
    if scheme == "int8" and form == "fp32":
        layer = quant.lower(model)["model.layers.0.mlp.up_proj"]
        assert torch.equal(weight, codes.dequantize(layer.weight, codes.unit_of(layer.SCB)))


@pytest.mark.parametrize("scheme", ["int8", "nf4 twice"])
def test_layers_that_hold_their_weight_the_other_way_round_stay_so(scheme: str, tmp_path) -> None:
    """GPT-2's: the plain class takes the matrices of its quantised layers transposed, square ones as well."""
    config = T.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    T.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    settings = T.BitsAndBytesConfig(**SCHEMES[scheme])
    model = T.GPT2LMHeadModel.from_pretrained(tmp_path / "plain", quantization_config=settings)
    model.save_pretrained(tmp_path / "model")
    export_run(tmp_path / "model", tmp_path / "fp32", form="fp32")
    exact, copied = (T.GPT2LMHeadModel.from_pretrained(tmp_path / name) for name in ("plain", "fp32"))
    for name, weight in exact.named_parameters():
        assert (copied.get_parameter(name) - weight).norm() <= 0.2 * weight.norm(), name
    error, why_not = compare.measure_output_error(tmp_path / "model", tmp_path / "fp32", "fp32")
    assert why_not is None and error is not None and error < 0.1
    quant.lower(model)
    quant.lowering.dequantize(model, torch.float32)
    for name, weight in copied.named_parameters():
        assert torch.allclose(model.get_parameter(name), weight, atol=1e-6), name


def test_a_copy_that_is_not_the_whole_model_is_not_called_one(tmp_path) -> None:
    quantized("llama").save_pretrained(tmp_path / "model")
    export_run(tmp_path / "model", tmp_path / "plain", form="fp32")
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ZOError, match=r"is incomplete: model\.norm\.weight"):
        compare.measure_output_error(tmp_path / "model", tmp_path / "plain", "fp32")


def test_outputs_that_cannot_be_compared_are_said_to_be_so(tmp_path) -> None:
    quantized("llama").save_pretrained(tmp_path / "model")
    export_run(tmp_path / "model", tmp_path / "plain", form="fp32")
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**settings, "architectures": ["MyModel"]}))
    found = compare.measure_output_error(tmp_path / "model", tmp_path / "plain", "fp32")
    assert found == (None, "transformers has no class MyModel")


def test_a_folder_without_adapters_has_none_to_export(tmp_path) -> None:
    quantized("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ZOError, match="holds no adapters"):
        export_run(tmp_path / "model", tmp_path / "adapters", form="adapters")


def test_merging_adapters_requantises_and_says_what_it_lost() -> None:
    model, inputs = quantized("opt"), batch("opt", 4, 9)
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=0.5, quantized="adapters", engine="eager")
    zm.update(projected_grad=torch.tensor(1.0))
    tuned = logits(model, inputs)
    errors = merge.merge(model)
    assert len(errors) == 12 and all(0 < error < 1 for error in errors.values())
    assert not has_adapters(model)
    spread = (logits(model, inputs) - tuned).abs().mean() / tuned.std()
    assert 0 < spread < 0.1
    with pytest.raises(ZOError, match="no adapters to merge"):
        merge.merge(model)


def test_what_merging_lost_is_of_the_change(tmp_path) -> None:
    """Plain float32 layers lose rounding alone, bfloat16 ones more, an adapter that adds nothing nothing."""
    peft = pytest.importorskip("peft")
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = peft.get_peft_model(plain("opt", dtype), peft.LoraConfig(r=2, target_modules=["fc1"]))
        first, _ = (module for module in model.modules() if hasattr(module, "lora_B"))
        torch.nn.init.normal_(first.lora_B["default"].weight)
        exact = first.base_layer.weight.double() + merge.lora_delta(first, "default").double()
        errors[dtype] = merge.merge(model)
        assert errors[dtype].pop(next(n for n in errors[dtype] if ".1." in n)) == 0.0
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        assert torch.allclose(first.base_layer.weight.double(), exact, rtol=tolerance, atol=tolerance)
    (one,), (other,) = (found.values() for found in errors.values())
    assert one < 1e-6 < 1e-4 < other < 1e-1


def test_a_tied_head_is_not_merged_into() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(plain("opt"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    embedding = model.get_input_embeddings().weight.clone()
    with pytest.raises(ZOError, match=r"lm_head is tied to that of .*embed_tokens"):
        merge.merge(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_run_goes_on_from_a_model_of_its_own_checkpoint(tmp_path) -> None:
    """The scales of a checkpoint's model are tuned ones: the logarithms are relative to those of the start."""
    inputs = batch("opt", 4, 9)
    whole = wrap("scales")
    whole.update(projected_grad=torch.tensor(2.0))
    checkpoint = Run(tmp_path).save_checkpoint(1, whole, {})
    tuned = logits(whole.model, inputs)
    again = zowrap.zo_wrap(
        type(whole.model).from_pretrained(checkpoint), "meazo", lr=1e-2, quantized="scales", engine="eager", seed=3
    )
    load_checkpoint(checkpoint, again)
    assert torch.equal(logits(again.model, inputs), tuned)
    for zm in (whole, again):
        zm.step(**inputs)
    for p, q in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(p.tensor, q.tensor) and torch.equal(p.scale, q.scale), p.name


def test_a_checkpoint_without_the_scales_is_of_another_model(tmp_path) -> None:
    whole = wrap("scales")
    checkpoint = Run(tmp_path).save_checkpoint(0, whole, {})
    file = checkpoint / "zo_state.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("scales/"))
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    before = [p.scale.clone() for p in whole.parameters if p.scale is not None]
    with pytest.raises(ZOError, match=f"is of another model: it has no {name.replace('/', ' of ')}"):
        load_checkpoint(checkpoint, whole)
    assert all(map(torch.equal, before, [p.scale for p in whole.parameters if p.scale is not None]))


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4 twice"])
def test_a_lowered_model_saves_itself_as_it_is(scheme: str, tmp_path) -> None:
    model, inputs = quantized("opt", scheme), batch("opt", 4, 9)
    if scheme == "int8":
        zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-1, quantized="scales", engine="eager")
        zm.update(projected_grad=torch.tensor(2.0))
    else:
        quant.lower(model)
    tuned = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model, inputs), tuned)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), inputs), tuned)


def test_a_lowered_model_takes_its_state_dict_again() -> None:
    zm, other, inputs = wrap("scales"), wrap("scales"), batch("opt", 4, 9)
    zm.update(projected_grad=torch.tensor(2.0))
    other.update(projected_grad=torch.tensor(-1.0))
    other.model.load_state_dict(zm.model.state_dict())
    assert torch.equal(logits(other.model, inputs), logits(zm.model, inputs))


# --- adapters -------------------------------------------------------------------------------------------------------


def test_a_trainers_run_of_adapters_says_how_its_base_was_loaded(tmp_path) -> None:
    args = ZOConfig(output_dir=str(tmp_path / "run"), max_steps=2, lr="1e-1", rule="zo_sgd", quantized="adapters",
                    engine="eager", report_to="none", per_device_train_batch_size=4)  # fmt: skip
    model, inputs = quantized("opt"), batch("opt", 4, 9)
    trainer = ZOTrainer(model, args, train_dataset=Rows())
    trainer.train()
    tuned = logits(model, inputs)
    _, errors = export_merged(tmp_path / "run", tmp_path / "merged", load_adapted)
    assert all(0 < error < 1 for error in errors.values())
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert merged.is_quantized
    assert (logits(merged, inputs) - tuned).norm() < 0.2 * tuned.norm()
    export_run(tmp_path / "run", tmp_path / "fp32", form="fp32", load=load_adapted)
    exact = type(model).from_pretrained(tmp_path / "fp32")
    assert not getattr(exact, "is_quantized", False)
    assert (logits(exact, inputs) - tuned).norm() < 0.2 * tuned.norm()
    layer = "model.decoder.layers.0.fc1"
    lora = trainer.model.get_submodule(layer)
    wanted = lowering.lowered_layers(model)[f"{layer}.base_layer"].dequantize() + merge.lora_delta(lora, "default")
    assert torch.equal(exact.get_submodule(layer).weight, wanted)


def test_adapters_of_another_kind_are_not_merged() -> None:
    peft = pytest.importorskip("peft")
    model = quantized("opt")
    around = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1"], use_dora=True))
    quant.lower(around)
    with pytest.raises(ZOError, match="DoRA"):
        merge.merge(around)
    assert has_adapters(around)


@pytest.mark.parametrize("name", ["p-tuning", "prompt tuning", "context-aware prompt", "vblora", "lora"])
def test_the_best_of_adapters_that_peft_saves_otherwise_is_loaded_at_the_end(name: str, tmp_path) -> None:
    """Of a prompt peft saves what its encoder makes, and not the encoder, which goes on to be trained."""
    pytest.importorskip("peft")
    from tests.support.peft_methods import adapted, base_folder, words

    rows = [{key: value[i % 3] for key, value in words().items()} for i in range(6)]
    model = adapted(name, base_folder(tmp_path / "base"))
    args = ZOConfig(
        str(tmp_path / "run"), max_steps=6, lr=0.3, rule="zo_sgd", engine="eager", report_to="none",
        per_device_train_batch_size=3, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = ZOTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.best_step == min(losses, key=losses.__getitem__)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
