"""Scales, codes and adapters: compiled equals eager, only what should moves, and models reload as the library's own."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import zowrap
from tests.support.families import batch
from tests.support.quantized_models import SCHEMES, logits, plain, quantized
from tests.support.slow import slow_except
from zowrap import names, quant
from zowrap.calibration.noise_floor import NoiseFloor, estimate_slope_and_floor
from zowrap.errors import ZOError, ZOWarning
from zowrap.model.zo_model import ZOModel
from zowrap.numerics import codes, noise
from zowrap.quant import lowering, modes
from zowrap.quant.layers import Int8Linear
from zowrap.training.environment import describe_environment

WAYS = names.QUANT_MODES


def wrap(way: str | None, engine: str | None = "eager", scheme: str = "int8", **options: Any) -> ZOModel:
    options = {"lr": 1e-3, **options}
    return zowrap.zo_wrap(quantized("opt", scheme), "zo_sgd", quantized=way, engine=engine, **options)


def int8_codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.clone() for name, layer in lowering.lowered_layers(model).items()}


@pytest.fixture(scope="module", params=slow_except(["scales"], WAYS))
def pair(request) -> tuple[str, ZOModel, ZOModel]:
    return request.param, wrap(request.param), wrap(request.param, "compiled")


def test_compiled_equals_eager(pair) -> None:
    """Losses agree to 2e-4: a last bit may carry an activation over the edge between two of its 8-bit values."""
    _, eager, compiled = pair
    for rows, length in ((4, 9), (1, 5), (3, 2)):
        inputs = batch("opt", rows, length, seed=rows)
        for zm in (eager, compiled):
            zm.discard()
            zm.accumulate(**inputs)
        assert torch.allclose(eager.peek()[0], compiled.peek()[0], rtol=2e-4, atol=0)
        assert torch.allclose(eager.loss(**inputs), compiled.loss(**inputs), rtol=2e-4, atol=0)
    assert compiled.inspect().engine == "compiled"


def test_given_the_same_projected_gradients_they_move_the_same_way(pair) -> None:
    way, eager, compiled = pair
    start = [p.tensor.clone() for p in eager.parameters]
    for zm in (eager, compiled):
        zm.lr = 1e-2
    for g in (1.0, -3.0, 0.25, 2.0):
        for zm in (eager, compiled):
            zm.update(projected_grad=torch.tensor(g))
    for p, q, before in zip(eager.parameters, compiled.parameters, start, strict=True):
        if way == "codes":
            assert not torch.equal(p.tensor, before)
            assert torch.equal(p.tensor, q.tensor), p.name
        else:
            assert (p.tensor - q.tensor).norm() <= 1e-5 * (p.tensor - before).norm() > 0, p.name


def test_a_skipped_step_changes_no_bit(pair) -> None:
    for zm in pair[1:]:
        before = [p.tensor.clone() for p in zm.parameters]
        assert zm.update(projected_grad=torch.tensor(float("nan"))).skipped
        assert all(torch.equal(p.tensor, b) for p, b in zip(zm.parameters, before, strict=True))


def test_the_points_of_a_step_read_the_codes_once(pair) -> None:
    way, _, compiled = pair
    compiled.accumulate(**batch("opt", 4, 9))
    compiled.discard()
    (program,) = (e.program for key, e in compiled.engine.executables.items() if key[2] == 2)
    targets = [str(node.target) for node in program.graph.nodes]
    layers = len(lowering.lowered_layers(compiled.model))
    expected = "zowrap.codes_points.default" if way == "codes" else "zowrap.int8_points.default"
    assert targets.count(expected) + targets.count("zowrap.int8_linear.default") == layers
    assert targets.count(expected) >= layers - 3  # adapters: the first layer's inputs are one for both points


@pytest.mark.slow
@pytest.mark.parametrize("scheme, way", [("int8 with outliers", "scales"), ("nf4 twice", "adapters")])
def test_other_schemes_step_alike_under_both_engines(scheme: str, way: str) -> None:
    eager, compiled = (wrap(way, engine, scheme) for engine in ("eager", "compiled"))
    inputs = batch("opt", 4, 9)
    results = [zm.step(**inputs) for zm in (eager, compiled)]
    assert torch.allclose(results[0].losses, results[1].losses, rtol=2e-4, atol=0)
    assert compiled.inspect().engine == "compiled" and not results[1].skipped
    before = [p.tensor.clone() for p in wrap(way, "eager", scheme).parameters]
    for zm in (eager, compiled):
        assert any(not torch.equal(p.tensor, b) for p, b in zip(zm.parameters, before, strict=True))
        assert zm.loss(**inputs).isfinite()


# --- what moves -----------------------------------------------------------------------------------------------------


def test_scales_move_and_stay_positive_and_codes_stay() -> None:
    zm = wrap("scales", lr=10.0)
    before = int8_codes(zm.model)
    assert zm.eps == 1e-1
    assert {p.name.rsplit(".", 1)[1] for p in zm.parameters} == {"log_scale"}
    for g in (200.0, -5.0):
        zm.update(projected_grad=torch.tensor(g).clamp(-1, 1))
    layers = lowering.lowered_layers(zm.model)
    assert all((layer.scale() > 0).all() for layer in layers.values())  # type: ignore[operator]
    assert all(torch.equal(before[name], layer.weight) for name, layer in layers.items())
    assert all(layer.log_scale.abs().max() > 0 for layer in layers.values())


def test_scales_are_probed_by_a_factor_and_clipped() -> None:
    layer = Int8Linear.__new__(Int8Linear)
    nn.Module.__init__(layer)
    layer.register_buffer("SCB", torch.tensor([2.0, 0.5]))
    layer.log_scale = nn.Parameter(torch.tensor([0.1, -0.2]))
    assert torch.allclose(layer.scale(), torch.tensor([2.0, 0.5]) * torch.tensor([0.1, -0.2]).exp())
    project, eps = wrap("scales").job.project, torch.tensor(0.01)
    assert [float(project(torch.tensor(pair), eps)) for pair in ((9.0, 5.0), (5.0, 9.0), (0.5, 0.25))] == [
        100,
        -100,
        12.5,
    ]


def test_only_adapters_move() -> None:
    zm = wrap("adapters")
    before = {name: t.clone() for name, t in zm.model.named_parameters()}
    assert all("lora_" in p.name for p in zm.parameters)
    for g in (1.0, -2.0):
        zm.update(projected_grad=torch.tensor(g))
    moved = {name for name, t in zm.model.named_parameters() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_unquantised_weights_move_along_where_named() -> None:
    scales = {p.name for p in wrap("scales", trainable=["fc1", "final_layer_norm"]).parameters}
    assert any(name.endswith("fc1.log_scale") for name in scales)
    assert any(name.endswith("fc1.bias") for name in scales)
    assert any(name.endswith("final_layer_norm.weight") for name in scales)
    assert not any("q_proj" in name for name in scales)
    by_weight = {p.name for p in wrap("scales", trainable=["*.fc1.weight"]).parameters}
    assert by_weight and all(name.endswith("fc1.log_scale") for name in by_weight)
    moving = wrap("codes", trainable=["fc1"]).parameters
    assert {p.codes for p in moving} == {True, False}


# --- codes ----------------------------------------------------------------------------------------------------------


def test_rounding_of_codes_is_unbiased() -> None:
    """The mean over many keys lies within 4 standard errors of the exact value, below and above one step."""
    keys, unit = 4000, torch.tensor([0.01, 0.5])
    stored = torch.tensor([[3, -120, 0], [7, 100, -1]], dtype=torch.int8)
    change = torch.tensor([[1e-5, -0.003, 0.0], [0.7, -0.6, 1e-3]])
    total = torch.zeros(2, 3)
    for seed in range(keys):
        key = noise.derive_keys(seed, 5, 0, torch.tensor([11]), noise.TAG_ROUNDING)[0]  # as the epilogue draws them
        bits = noise.hash_bits(*noise.split_index(torch.arange(6)), key).reshape(2, 3)
        total += codes.add_change(stored, change, unit, bits, torch.tensor(True)).float()
    exact = stored.float() + change / unit.unsqueeze(1)
    fraction = exact - exact.floor()
    error = (fraction * (1 - fraction) / keys).sqrt()
    assert ((total / keys - exact).abs() <= 4 * error + 1e-6).all()


def test_codes_end_at_127_and_full_rows_are_counted() -> None:
    stored = torch.tensor([[126, -127, 0, 1]], dtype=torch.int8)
    change = torch.tensor([[5.0, -5.0, 5.0, 0.0]])
    new = codes.add_change(stored, change, torch.ones(1), torch.zeros(1, 4, dtype=torch.int32), torch.tensor(True))
    assert new.tolist() == [[127, -127, 5, 1]]
    assert modes.count_saturated_rows(new) == 1
    assert modes.count_saturated_rows(torch.zeros(3, 4, dtype=torch.int8)) == 0


def test_a_freshly_quantised_row_is_not_full_however_short_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    for columns in (3, 32, 50, 384):
        rows = torch.randint(-60, 60, (40, columns), generator=draw).to(torch.int8)
        rows[:, 1] = 127
        assert modes.count_saturated_rows(rows) == 0
        rows[:7] = -127
        assert modes.count_saturated_rows(rows) == 7


def test_rows_are_counted_on_demand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    zm = wrap("codes", queries=modes.CODE_QUERIES)
    zm.update(projected_grad=torch.zeros(modes.CODE_QUERIES))
    monkeypatch.setattr(modes, "count_saturated_rows", lambda codes: 1)
    report, layers = zm.inspect(), len(lowering.lowered_layers(zm.model))
    assert report.full_rows == (layers, sum(len(p.tensor) for p in zm.parameters))
    assert report.as_dict()["full_rows"] == layers and f"; {layers} of " in str(report)

    def refuse(codes: Tensor) -> int:
        raise AssertionError("all codes were read")

    monkeypatch.setattr(modes, "count_saturated_rows", refuse)
    assert describe_environment(zm)["engine"] == "eager" and zm.inspect().quantized.startswith("codes move")


def test_a_row_of_zeros_keeps_them() -> None:
    stored = torch.zeros(1, 2, dtype=torch.int8)
    bits = torch.full((1, 2), -1, dtype=torch.int32)
    assert codes.add_change(stored, torch.ones(1, 2), torch.zeros(1), bits, torch.tensor(True)).tolist() == [[0, 0]]


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["scales", "codes"])
def test_a_tuned_model_reloads_with_the_same_logits(way: str, tmp_path) -> None:
    zm = wrap(way, lr=1e-2)
    inputs = batch("opt", 4, 9)
    untouched = logits(zm.model, inputs)
    for g in (2.0, -1.0):
        zm.update(projected_grad=torch.tensor(g))
    tuned = logits(zm.model, inputs)
    assert not torch.equal(tuned, untouched)
    zm.save_pretrained(str(tmp_path))
    assert torch.equal(logits(zm.model, inputs), tuned)
    assert torch.equal(logits(type(zm.model).from_pretrained(tmp_path), inputs), tuned)
    quant.raise_back(zm.model)
    assert torch.equal(logits(zm.model, inputs), tuned)


# --- choices and refusals -------------------------------------------------------------------------------------------


def test_the_default_is_chosen_and_explained() -> None:
    assert "scales move (the default for 8-bit" in str(wrap(None).inspect())
    assert "no scales move: trainable selects unquantised weights alone" in str(wrap(None, trainable="*bias").inspect())
    assert "no codes move" in str(wrap("codes", trainable="*bias").inspect())
    assert wrap(None, scheme="nf4").inspect().quantized.startswith("adapters move (the scales of")
    assert "experimental" in wrap("codes").inspect().quantized
    assert zowrap.zo_wrap(nn.Linear(2, 2), "zo_sgd", loss_fn=lambda m, b: b["x"].sum()).inspect().quantized is None


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"way": "weights"}, "unknown quantized 'weights'"),
        ({"way": "codes", "scheme": "nf4"}, "8-bit weights: one step of a 4-bit code"),
        ({"way": "scales", "scheme": "nf4"}, "needs exact scales"),
        ({"way": "codes", "direction": "lowrank(2)"}, "full rank"),
        ({"way": "codes", "estimator": "population"}, "full rank"),
        ({"way": "scales", "masters": True}, "masters=True is for 16-bit weights"),
        ({"way": "scales", "along": "evaluated"}, "along='evaluated' is for 16-bit weights"),
        ({"way": "codes", "along": "evaluated"}, "and what moves here is int8"),
        ({"way": "codes", "direction": "sparse"}, "reads weights in floating point"),
        ({"way": "scales", "trainable": ["nowhere"]}, "nothing is left to tune"),
        ({"way": "codes", "trainable": ["nowhere"]}, "nothing is left to tune"),
    ],
)
def test_what_cannot_be_is_refused(options, problem) -> None:
    with pytest.raises(ZOError, match=problem):
        wrap(**options)


def test_a_model_without_quantised_weights_is_refused() -> None:
    with pytest.raises(ZOError, match="this model has none"):
        zowrap.zo_wrap(nn.Linear(2, 2), quantized="scales", loss_fn=lambda m, b: b["x"].sum())


@pytest.mark.parametrize("way", slow_except(["scales"], ["scales", "adapters"]))
def test_a_population_on_quantised_weights_runs_eagerly_and_says_so(way: str) -> None:
    zm, inputs = wrap(way, engine=None, estimator="population"), batch("opt", 3, 6)
    before = [p.tensor.clone() for p in zm.parameters]
    with pytest.warns(ZOWarning, match="running eagerly"):
        result = zm.step(**inputs)
    assert zm.inspect().fallen_back and zm.inspect().engine == "eager"
    assert result.projected_grad.shape == (3,) and not result.skipped
    assert any(not torch.equal(p.tensor, b) for p, b in zip(zm.parameters, before, strict=True))
    assert torch.equal(wrap(way, estimator="population").step(**inputs).losses, result.losses)
    with pytest.raises(ZOError, match="engine='compiled' was asked for"):
        wrap(way, "compiled", estimator="population").step(**inputs)


def test_an_eps_below_the_rounding_of_activations_is_warned_of() -> None:
    with pytest.warns(ZOWarning, match="below 0.02"):
        wrap("scales", eps=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZOWarning)
        wrap("scales")
        wrap("adapters", scheme="nf4", eps=1e-6)  # rounds no activations


def test_codes_are_warned_of_unless_many_directions_share_a_write() -> None:
    with pytest.warns(ZOWarning, match="rounding outweighs progress"):
        wrap("codes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ZOWarning)
        wrap("codes", queries=modes.CODE_QUERIES)


def test_scales_that_moved_are_kept_when_codes_move_next() -> None:
    zm, inputs = wrap("scales", lr=1e-2), batch("opt", 4, 9)
    zm.update(projected_grad=torch.tensor(2.0))
    tuned = logits(zm.model, inputs)
    zowrap.zo_wrap(zm.model, "zo_sgd", lr=1e-3, quantized="codes", engine="eager")
    assert torch.equal(logits(zm.model, inputs), tuned)


def test_the_noise_floor_is_measured_and_nothing_moves() -> None:
    zm = wrap("scales")
    before = [p.tensor.clone() for p in zm.parameters]
    found = quant.noise_floor(zm, batch("opt", 8, 12), directions=20)
    assert all(torch.equal(p.tensor, b) for p, b in zip(zm.parameters, before, strict=True))
    assert (found.eps, found.against) == (0.1, pytest.approx(0.1 / 3))
    assert 0 < found.rounding < 2 * found.eps * found.slope and 0 < found.floor < found.eps and not found.hidden
    assert found.agreement >= 0.9
    assert quant.noise_floor(zm, batch("opt", 8, 12), eps=1e-2, directions=20, against=1e-1).agreement >= 0.9
    assert zm.step_count == 0
    assert found.record()["rounding"] == found.rounding
    with pytest.raises(ZOError, match="eps must be a positive finite number"):
        quant.noise_floor(zm, batch("opt", 8, 12), eps=0.0)
    with pytest.raises(ZOError, match="directions must be at least 1"):
        quant.noise_floor(zm, batch("opt", 8, 12), directions=0)


def test_layers_that_round_no_activations_have_no_floor() -> None:
    with pytest.raises(ZOError, match="rounds its activations"):
        quant.noise_floor(wrap("adapters", scheme="nf4"), batch("opt", 8, 12))


def test_tuned_scales_are_not_left_under_adapters() -> None:
    zm = wrap("scales", lr=1e-2)
    zowrap.zo_wrap(wrap("scales").model, "zo_sgd", quantized="adapters", engine="eager")  # scales as they were
    zm.update(projected_grad=torch.tensor(2.0))
    with pytest.raises(ZOError, match=r"the scales of .* were tuned"):
        zowrap.zo_wrap(zm.model, "zo_sgd", quantized="adapters", engine="eager")


def test_where_rounding_outweighs_the_slope_there_is_no_floor() -> None:
    slope, floor = estimate_slope_and_floor(0.5, 0.3, 0.1)
    assert slope == pytest.approx(2.0) and floor == pytest.approx(0.075)
    for whole in (0.42, 0.3, 0.1):  # 2εs below n, nothing, less than nothing
        assert all(math.isnan(value) for value in estimate_slope_and_floor(whole, 0.3, 0.1))
    found = NoiseFloor(1e-3, math.nan, 0.3, math.nan, 0.5, 3e-4)
    assert found.hidden and found.record()["floor"] is None


# --- beside adapters ------------------------------------------------------------------------------------------------


def test_what_moves_beside_adapters_is_saved_with_them(tmp_path) -> None:
    zm = wrap("adapters", trainable=["*lora_*", "*layer_norm*"], lr=1e-1)
    inputs = batch("opt", 4, 9)
    zm.update(projected_grad=torch.tensor(2.0))
    tuned = logits(zm.model, inputs)
    zm.save_pretrained(str(tmp_path))
    settings = BitsAndBytesConfig(**SCHEMES["int8"])
    again = type(zm.model).from_pretrained(tmp_path, quantization_config=settings)
    assert torch.equal(logits(again, inputs), tuned)


@pytest.mark.parametrize(
    "trainable, problem",
    [
        (["*lora_*", "*fc1.bias"], r"fc1\.bias cannot be saved"),
        (["*lora_*", "*embed_tokens*"], r"embed_tokens\.weight cannot be saved"),
        (["*lora_*", "*fc1.weigth"], "matches none"),
        (["*fc1.weight"], "matches none"),
    ],
)
def test_what_cannot_be_saved_with_adapters_is_refused(trainable, problem) -> None:
    with pytest.raises(ZOError, match=problem):
        wrap("adapters", trainable=trainable)


def test_a_peft_model_without_quantised_weights_saves_what_moves_too(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = plain("opt"), batch("opt", 4, 9)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-1, trainable=["*lora_*", "*layer_norm*"], engine="eager")
    zm.update(projected_grad=torch.tensor(2.0))
    zm.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(plain("opt"), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("way", ["scales", "codes"])
def test_scales_and_codes_are_refused_beside_adapters(way: str) -> None:
    model = wrap("adapters").model
    with pytest.raises(ZOError, match="would be lost"):
        zowrap.zo_wrap(model, "zo_sgd", quantized=way, engine="eager")


def test_layers_named_as_a_whole_move_by_their_adapters() -> None:
    """The codes under an adapter never move, whatever names them."""
    model = quantized("llama")
    zm = zowrap.zo_wrap(model, "zo_sgd", quantized="adapters", trainable=["layers.1"], engine="eager")
    assert any("lora_" in p.name for p in zm.parameters)
    assert all("layers.1." in p.name and not p.codes for p in zm.parameters)


# --- trainable ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["scales", "codes"])
def test_a_predicate_is_given_tensors(way: str) -> None:
    by_shape = wrap(way, trainable=lambda name, tensor: tensor.ndim >= 2 and "fc1" in name)
    assert {p.name.rsplit(".", 2)[-2] for p in by_shape.parameters} == {"fc1"}


@pytest.mark.parametrize("way", ["scales", "codes"])
def test_each_pattern_must_match_something(way: str) -> None:
    with pytest.raises(ZOError, match="fc1_weights"):
        wrap(way, trainable=["fc1", "fc1_weights"])


@pytest.mark.parametrize("options", [{"way": "weights"}, {"way": "codes", "scheme": "nf4"}, {"lr": -1.0}])
def test_a_refused_model_is_as_it_was(options) -> None:
    model = quantized("opt", options.pop("scheme", "int8"))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ZOError):
        zowrap.zo_wrap(model, "zo_sgd", quantized=options.pop("way", None), **options)
    assert [type(module) for module in model.modules()] == kinds
