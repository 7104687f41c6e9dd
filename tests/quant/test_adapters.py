"""Adapters of every kind of peft: our loss is theirs, they alone move, and what is saved is what they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zowrap
from tests.support.peft_methods import METHODS, adapted, base_folder, load_base, logits_of, loss_of, words
from zowrap.errors import ZOError
from zowrap.quant import adapters
from zowrap.step.pretrained import has_adapters
from zowrap.training.checkpoint import load_checkpoint
from zowrap.training.run_folder import Run

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("adapters") / "base")


def wrap(model: Any, **options: Any) -> Any:
    return zowrap.zo_wrap(model, "zo_sgd", **{"lr": 1e-2, "eps": 1e-3, "engine": "eager", **options})


def base_weights(model: Any) -> dict[str, Tensor]:
    """Copies of the weights that peft leaves as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_trains_and_is_loaded_by_peft(name: str, base: Path, tmp_path: Path) -> None:
    model, batch = adapted(name, base), words()
    assert has_adapters(model)
    start, before, fixed = loss_of(model, **batch), logits_of(model, **batch), base_weights(model)
    zm = wrap(model)
    assert zm.loss(**batch).item() == pytest.approx(start, abs=1e-4)
    step = zm.step(**batch)
    # Some kinds divide by the norm of what is 0 at first: there, the smallest step is a large one.
    assert step.loss.item() == pytest.approx(start, abs=0.3) and not step.skipped
    for g in (1.0, -3.0):
        zm.update(projected_grad=torch.tensor(g))
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in fixed.items())
    zm.save_pretrained(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "saved").eval()
    after = logits_of(model, **batch)  # adalora cannot compute a loss after loading
    assert torch.allclose(logits_of(again, **batch), after, atol=1e-5)
    assert (after - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["loha", "adalora", "vblora", "lora and tokens", "p-tuning", "context-aware prompt"])
def test_a_resumed_run_is_the_whole_one(name: str, base: Path, tmp_path: Path) -> None:
    whole, batch = wrap(adapted(name, base)), words()
    whole.step(**batch)
    checkpoint = Run(tmp_path).save_checkpoint(1, whole, {})
    whole.step(**batch)
    resumed = wrap(adapted(name, base))
    load_checkpoint(checkpoint, resumed)
    resumed.step(**batch)
    for p, q in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(p.tensor, q.tensor), p.name


def test_an_evaluation_leaves_a_projected_prompt_as_it_is(base: Path) -> None:
    """peft projects the prompt in every forward, and assigns the result to the weight."""
    model, batch = adapted("context-aware prompt", base), words()
    zm = wrap(model, lr=1.0)
    zm.update(projected_grad=torch.tensor(1.0))
    before = [p.tensor.clone() for p in zm.parameters]
    kept = {**batch, "input_type_mask": torch.full_like(batch["input_ids"], 4)}
    zm.loss(**kept)
    zm.accumulate(**kept)
    zm.discard()
    assert all(torch.equal(p.tensor, b) for p, b in zip(zm.parameters, before, strict=True))
    assert bool((kept["input_type_mask"] == 4).all())


@pytest.mark.parametrize("name", ["prompt tuning", "p-tuning", "prefix"])
def test_each_rows_loss_counts_the_first_token_as_peft_does(name: str, base: Path) -> None:
    """Micro-batches of one row combine to the loss of all, weighted by their label tokens."""
    model, batch = adapted(name, base), words()
    zm = wrap(model)
    whole = zm.loss(**batch).item()
    zm.discard()
    for row in range(3):
        zm.accumulate(**{key: value[row : row + 1] for key, value in batch.items()})
    losses, _ = zm.peek()
    assert losses.mean().item() == pytest.approx(whole, abs=1e-2)


def test_what_is_no_prompt_cannot_move_with_one(base: Path) -> None:
    with pytest.raises(ZOError, match="cannot be saved with a prompt"):
        wrap(adapted("prompt tuning", base), trainable=["*prompt_encoder*", "*layernorm*"])


def test_a_kind_of_layer_is_not_guessed_from_names(base: Path) -> None:
    """A base with parameters that are named like adapters."""
    model = adapted("lora", base)
    model.base_model.model.model.lora_like = torch.nn.Linear(2, 2)
    model.base_model.model.model.lora_like.requires_grad_(False)
    assert {p.name.rsplit(".", 2)[-2] for p in wrap(model).parameters} == {"lora_A", "lora_B"}


def test_the_base_runs_forward_whatever_it_is_quantised_by(base: Path, tmp_path: Path) -> None:
    """A stand-in for a layer of a package that has no kernel here: its codes are opaque, its outputs are right."""

    class QuantLinear(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.register_buffer("qweight", (layer.weight.detach() * 64).round().to(torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.qweight.to(x.dtype) / 64)

    QuantLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"

    def foreign() -> Any:
        model = load_base(base)
        for layer in model.model.layers:
            layer.mlp.up_proj = QuantLinear(layer.mlp.up_proj)
        model.config.quantization_config = {"quant_method": "gptq"}
        return model

    with pytest.raises(ZOError, match=r"GPTQ.*quantized='adapters'"):
        wrap(foreign())
    torch.manual_seed(0)
    model = peft.get_peft_model(foreign(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    start = loss_of(model.eval(), **words())
    zm = wrap(model)
    assert zm.quantized == "adapters" and zm.loss(**words()).item() == pytest.approx(start, abs=1e-4)
    zm.step(**words())
    zm.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(foreign(), tmp_path).eval()
    assert loss_of(again, **words()) == pytest.approx(loss_of(model, **words()), abs=1e-6)
    assert loss_of(model, **words()) != start


# --- tensors of experts ---------------------------------------------------------------------------------------------


def experts(folder: Path, *targets: str) -> Any:
    import transformers

    if not folder.exists():
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=[*targets], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(load_base(folder), config).eval()


TARGETS = [("mlp.experts.gate_up_proj",), ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")]


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_of_experts_tensors_train_and_are_loaded_by_peft(targets, tmp_path: Path) -> None:
    model, batch = experts(tmp_path / "base", *targets), words()
    start = loss_of(model, **batch)
    tensors = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    before = {name: p.clone() for name, p in tensors.items()}
    zm = wrap(model)
    assert zm.loss(**batch).item() == pytest.approx(start, abs=1e-5)
    assert zm.step(**batch).loss.item() == pytest.approx(start, abs=1e-2)
    zm.update(projected_grad=torch.tensor(1.0))
    for name, p in tensors.items():
        assert torch.equal(p, before[name]), name
        assert model.get_parameter(name) is p  # the same object: nothing was registered anew
    zm.save_pretrained(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(load_base(tmp_path / "base"), tmp_path / "saved").eval()
    assert loss_of(again, **batch) == pytest.approx(loss_of(model, **batch), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_of_experts_tensors_are_compiled(targets, tmp_path: Path) -> None:
    batch = words()
    eager, compiled = (wrap(experts(tmp_path / "base", *targets), engine=engine) for engine in ("eager", "compiled"))
    results = [zm.step(**batch) for zm in (eager, compiled)]
    assert torch.allclose(results[0].losses, results[1].losses, rtol=2e-5, atol=0)
    assert compiled.inspect().engine == "compiled"


def test_new_adapters_go_onto_the_part_that_is_saved(base: Path) -> None:
    """Linear layers beside it, such as those after a sentence encoder's transformer, get none."""

    class Form(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = load_base(base)
            self.after = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.after[0].separate_file = "2_Dense/model.safetensors"

    form = Form()
    adapters.attach(form)
    assert not has_adapters(form.after) and has_adapters(form.module)
