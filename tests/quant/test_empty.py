"""A quantised model is as large without its weights as with them, and what it would take is predicted from that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

import zowrap
from tests.support.costs import cost_model_of
from tests.support.families import batch
from tests.support.quantized_models import FAMILIES, SCHEMES, folder, quantized
from zowrap import quant
from zowrap.errors import ZOError
from zowrap.quant import adapters, lowering
from zowrap.quant import empty as skeleton
from zowrap.step.parameters import weight_bytes
from zowrap.step.pretrained import has_adapters


def empty(family: str, scheme: str | None = "int8", stored: bool = False) -> Any:
    """The family's model on the meta device, as loading it in a scheme would make it."""
    config = T.AutoConfig.from_pretrained(folder(family))
    if stored:
        assert scheme is not None
        config.quantization_config = T.BitsAndBytesConfig(**SCHEMES[scheme]).to_dict()
    kind: Any = getattr(T, config.architectures[0])
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.float32).eval()
    return skeleton.quantize_empty(model, None if stored or scheme is None else SCHEMES[scheme])


def layout(model: torch.nn.Module) -> dict[str, Any]:
    """What each tensor is, its values aside."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors if not name.endswith(("position_ids", "inv_freq"))}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_holds_what_a_loaded_model_holds(family: str, scheme: str, stored: bool) -> None:
    loaded, bare = quantized(family, scheme), empty(family, scheme, stored)
    quant.lower(loaded)
    assert layout(bare) == layout(loaded)
    assert weight_bytes(bare) == weight_bytes(loaded)
    assert all(p.is_meta for p in bare.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme, way", [("int8", "scales"), ("int8", "codes"), ("int8", "adapters"), ("nf4 twice", "adapters")]
)
def test_its_costs_are_those_of_the_loaded_model(scheme: str, way: str) -> None:
    inputs = batch("opt", 4, 9)
    found = []
    for model, given in (
        (quantized("opt", scheme), inputs),
        (empty("opt", scheme), {name: value.to("meta") for name, value in inputs.items()}),
    ):
        zm = zowrap.zo_wrap(model, "zo_sgd", quantized=way)
        found.append(cost_model_of(zm, given).costs().as_dict())
        assert str(zm.inspect().quantized).startswith(f"{way} move")
    assert found[0]["memory"] == found[1]["memory"]
    assert all(found[0]["step"][name] == found[1]["step"][name] for name in ("flops", "weight_bytes", "noise"))
    assert 0.9 < found[0]["flops_ratio"] < (2.5 if way == "codes" else 1.2)
    assert found[0]["memory"]["transient"] > 0


def test_a_model_as_it_is_stays_as_it_is() -> None:
    assert not lowering.is_quantized(empty("opt", None))


def test_adapters_are_put_on_it() -> None:
    model = empty("llama", "nf4")
    adapters.attach(model, 2, 4)
    assert has_adapters(model) and lowering.lowered_layers(model)
    assert {str(p.device) for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("method, problem", [("gptq", "quantised by GPTQ"), ("torchao", "inspected without")])
def test_what_a_configuration_does_not_say_is_refused(method: str, problem: str) -> None:
    config = T.AutoConfig.from_pretrained(folder("opt"))
    config.quantization_config = {"quant_method": method}
    with torch.device("meta"):
        model = T.OPTForCausalLM._from_config(config)
    with pytest.raises(ZOError, match=problem):
        skeleton.quantize_empty(model, None)
