"""Lowered layers give the library's outputs bit for bit, and going back gives the library's state dict."""

from __future__ import annotations

import copy

import bitsandbytes.nn
import pytest
import torch
from torch import Tensor, nn

from tests.support.families import batch
from tests.support.quantized_models import FAMILIES, SCHEMES, logits, quantized
from zowrap import quant
from zowrap.compiler.capture import capture
from zowrap.errors import ZOError
from zowrap.loss.module import LossModule
from zowrap.quant import lowering
from zowrap.quant.schemes import check_scheme


def inputs_of(family: str) -> list[dict[str, Tensor]]:
    """Batches with padded rows, and one row of one token."""
    return [batch(family, rows, length, seed=rows) for rows, length in ((4, 9), (1, 5), (1, 1))]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lowered_model_is_the_original_bit_for_bit(family: str, scheme: str) -> None:
    library, ours = quantized(family, scheme), quantized(family, scheme)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    layers = [m for m in library.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert len(quant.lower(ours)) == len(layers) > 0
    for inputs in inputs_of(family):
        assert torch.equal(logits(ours, inputs), logits(library, inputs))
    quant.raise_back(ours)
    assert not lowering.lowered_layers(ours)
    assert same(ours.state_dict(), before)
    for inputs in inputs_of(family):
        assert torch.equal(logits(ours, inputs), logits(library, inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_raise_lower_raise_is_the_identity_on_the_state_dict(scheme: str) -> None:
    model = quantized("llama", scheme)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        quant.lower(model)
        logits(model, batch("llama", 2, 5))
        with lowering.original_layers(model):
            assert same(model.state_dict(), before)
        assert lowering.lowered_layers(model)
        quant.raise_back(model)
        assert same(model.state_dict(), before)


def test_lowering_copies_no_weight() -> None:
    model = quantized("opt")
    data = {m.weight.data_ptr() for m in model.modules() if type(m).__name__ == "Linear8bitLt"}
    found = quant.lower(model)
    assert {m.weight.data_ptr() for m in found.values()} == data
    assert all(m.original.weight.data_ptr() in data for m in found.values())


@pytest.mark.parametrize("scheme", ["int8", "int8 with outliers", "nf4 twice"])
def test_a_lowered_model_is_captured_exactly(scheme: str) -> None:
    model = quantized("opt", scheme)
    quant.lower(model)
    loss = LossModule(model)
    inputs = batch("opt", 4, 9)
    program = capture(loss, inputs)
    assert not [i for i in program.inputs if i.kind == "constant" and i.target.endswith("weight")]
    named = {**dict(loss.named_parameters(remove_duplicate=False)), **dict(loss.named_buffers())}
    for other in (inputs, batch("opt", 3, 6, seed=1)):
        values = [
            other[i.target] if i.kind == "batch" else named.get(i.target, program.constants.get(i.target))
            for i in program.inputs
        ]
        with torch.no_grad():
            assert torch.equal(program(values)[0], loss(other)[0])


def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    model = quantized("llama")
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    quant.lower(model)
    assert model.model.layers[1].self_attn.q_proj is model.model.layers[0].self_attn.q_proj


def test_an_empty_batch_has_an_empty_output() -> None:
    layer = next(iter(quant.lower(quantized("llama")).values()))
    assert layer(torch.zeros(0, 3, 64)).shape == (0, 3, layer.out_features)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, named", [("gptq", "GPTQ"), ("awq", "AWQ"), ("fp8", "FP8"), ("hqq", "HQQ")])
def test_other_schemes_are_named_with_the_ways_that_work(method: str, named: str) -> None:
    model = copy.deepcopy(quantized("bert"))
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(ZOError, match=rf"quantised by {named}.*bitsandbytes 8-bit.*torchao int8"):
        quant.lower(model)


def test_fp8_weights_are_recognised_without_a_configuration() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ZOError, match="fp8"):
        check_scheme(model)


def test_layers_of_other_packages_are_recognised_by_their_module() -> None:
    quanto = type("QLinear", (nn.Linear,), {"__module__": "optimum.quanto.nn.qlinear"})
    with pytest.raises(ZOError, match=r"Quanto \(0\)"):
        quant.lower(nn.Sequential(quanto(4, 4)))
    mine = type("QLinear", (nn.Linear,), {"__module__": "optimum_of_mine.quanto"})
    assert not quant.lower(nn.Sequential(mine(4, 4)))


def test_layers_of_torch_without_parameters_are_recognised() -> None:
    dynamic = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})
    with pytest.raises(ZOError, match=r"torch\.ao"):
        quant.lower(nn.Sequential(dynamic()))


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_layers_that_were_never_loaded_are_refused(kind: str) -> None:
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    layer = getattr(bitsandbytes.nn, kind)(64, 64, **options)
    with pytest.raises(ZOError, match=f"0 is a {kind} whose weights are not quantised yet"):
        quant.lower(nn.Sequential(layer))
    assert len(quant.lower(nn.Sequential(layer.to("cpu")))) == 1


def test_int8_layers_with_16_bit_weights_are_refused() -> None:
    from bitsandbytes.nn import Linear8bitLt

    with pytest.raises(ZOError, match="llm_int8_has_fp16_weight"):
        quant.lower(nn.Sequential(Linear8bitLt(4, 4, has_fp16_weights=True)))


def test_layers_on_several_devices_are_refused_and_the_model_is_as_it_was() -> None:
    model = quantized("opt")
    kinds = [type(module) for module in model.modules()]
    next(iter(quant.lower(model).values())).to("meta")  # stands in for a second device
    with pytest.raises(ZOError, match=r"several devices \(cpu, meta\)"):
        quant.lower(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_part_that_is_not_quantised_on_another_device_is_refused() -> None:
    model = quantized("opt")
    model.model.decoder.embed_tokens.to("meta")  # as offloading leaves it
    with pytest.raises(ZOError, match=r"several devices \(cpu, meta\)"):
        quant.lower(model)
    assert not lowering.lowered_layers(model)


def test_a_model_without_quantised_layers_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert not lowering.is_quantized(model)
    assert quant.lower(model) == {}


def test_torchao_int8_is_the_original_bit_for_bit() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    x = torch.randn(3, 2, 64)
    with torch.no_grad():
        before = model(x)
        state = {name: tensor.dequantize().clone() if hasattr(tensor, "qdata") else tensor.clone()
                 for name, tensor in model.state_dict().items()}  # fmt: skip
        assert len(quant.lower(model)) == 2
        assert torch.equal(model(x), before)
        targets = {str(n.target) for n in torch.export.export(model, (x,)).graph.nodes}
        assert {"aten.mm.default", "aten.mul.Tensor"} <= targets
        quant.raise_back(model)
        assert torch.equal(model(x), before)
    after = {n: t.dequantize() if hasattr(t, "qdata") else t for n, t in model.state_dict().items()}
    assert same(after, state)


def test_the_outlier_path_is_met_by_these_tests() -> None:
    inputs = batch("opt", 4, 9)
    assert not torch.equal(logits(quantized("opt"), inputs), logits(quantized("opt", "int8 with outliers"), inputs))
