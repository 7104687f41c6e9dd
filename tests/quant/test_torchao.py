"""torchao's int8 weight-only layers: scales and adapters move, and are saved, reloaded and resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

import zowrap
from tests.support.families import batch
from tests.support.quantized_models import folder, logits
from zowrap import quant
from zowrap.errors import ZOError
from zowrap.model.zo_model import ZOModel
from zowrap.quant import lowering
from zowrap.training.checkpoint import load_checkpoint, load_weights
from zowrap.training.run_folder import Run

pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def load(path: Any = None) -> Any:
    """The OPT model, quantised on loading; a saved one as it is."""
    if path is not None:
        return T.OPTForCausalLM.from_pretrained(path)
    from torchao.quantization import Int8WeightOnlyConfig

    settings = T.TorchAoConfig(Int8WeightOnlyConfig())
    return T.OPTForCausalLM.from_pretrained(folder("opt"), quantization_config=settings)


def wrap(way: str | None = None, engine: str = "eager", **options: Any) -> ZOModel:
    return zowrap.zo_wrap(load(), "zo_sgd", lr=1e-2, quantized=way, engine=engine, **options)


def test_tuned_scales_are_saved_and_reloaded_by_the_library(tmp_path) -> None:
    zm, inputs = wrap(), batch("opt", 4, 9)
    assert zm.quantized == "scales" and zm.eps == 0.1 and not zm.job.quant_mode.rounds  # type: ignore[union-attr]
    before = {name: layer.weight.clone() for name, layer in lowering.lowered_layers(zm.model).items()}
    untouched = logits(zm.model, inputs)
    for g in (2.0, -1.0):
        zm.update(projected_grad=torch.tensor(g))
    tuned = logits(zm.model, inputs)
    assert not torch.equal(tuned, untouched)
    assert all(torch.equal(before[name], layer.weight) for name, layer in lowering.lowered_layers(zm.model).items())
    zm.save_pretrained(str(tmp_path))
    assert torch.equal(logits(load(tmp_path), inputs), tuned)
    other = wrap()
    load_weights(tmp_path, other)  # as the best model of a run is taken
    for p, q in zip(zm.parameters, other.parameters, strict=True):
        assert torch.allclose(p.tensor, q.tensor, atol=1e-6), p.name
    again = zowrap.zo_wrap(load(tmp_path), "zo_sgd", lr=1e-2, engine="eager")  # of a quantised checkpoint
    again.update(projected_grad=torch.tensor(1.0))
    again.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(logits(load(tmp_path / "again"), inputs), logits(again.model, inputs))
    quant.raise_back(zm.model)
    assert torch.equal(logits(zm.model, inputs), tuned)


@pytest.mark.parametrize("way", ["scales", "adapters"])
def test_a_resumed_run_has_the_same_weights(way: str, tmp_path) -> None:
    whole, inputs = wrap(way), batch("opt", 4, 9)
    whole.step(**inputs)
    checkpoint = Run(tmp_path).save_checkpoint(1, whole, {})
    whole.step(**inputs)
    resumed = wrap(way)
    load_checkpoint(checkpoint, resumed)
    resumed.step(**inputs)
    for p, q in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(p.tensor, q.tensor), p.name


def test_codes_are_refused_by_the_name_of_their_scheme() -> None:
    with pytest.raises(ZOError, match="these are torchao's: use quantized='scales' or 'adapters'"):
        wrap("codes")


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    inputs = batch("opt", 4, 9)
    losses = [wrap("scales", engine).step(**inputs).losses for engine in ("eager", "compiled")]
    assert torch.allclose(*losses, rtol=2e-5, atol=0)
