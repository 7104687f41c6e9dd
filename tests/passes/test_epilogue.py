"""The epilogue writes each active parameter once, with the same numbers as the eager oracle."""

from __future__ import annotations

import bitsandbytes.nn
import pytest
import torch
from torch import nn

import zowrap
from tests.support.programs import TwoLayers, after, captured, kernels_of, mean_square, numbers, printed, wrap
from zowrap import rules
from zowrap.passes.epilogue import AppendEpilogue, Epilogue, build_epilogue, coefficient_shapes
from zowrap.passes.strip_training import StripTraining

ALONG_NOISE = """
def forward(keys_0, scale_0, rounding_keys, coefficient_g, lr, eps, weight_decay, apply, w_0, w_1, w_2, w_3):
    select_int = aten.select.int(keys_0, 0, 0)
    select_int_1 = aten.select.int(rounding_keys, 0, 0)
    update_ = zowrap.update_(w_0, [], [select_int], [scale_0], [], select_int_1, [coefficient_g], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_2 = aten.select.int(keys_0, 0, 1)
    select_int_3 = aten.select.int(rounding_keys, 0, 1)
    update__1 = zowrap.update_(w_1, [], [select_int_2], [scale_0], [], select_int_3, [coefficient_g], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_4 = aten.select.int(keys_0, 0, 2)
    select_int_5 = aten.select.int(rounding_keys, 0, 2)
    update__2 = zowrap.update_(w_2, [], [select_int_4], [scale_0], [], select_int_5, [coefficient_g], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_6 = aten.select.int(keys_0, 0, 3)
    select_int_7 = aten.select.int(rounding_keys, 0, 3)
    update__3 = zowrap.update_(w_3, [], [select_int_6], [scale_0], [], select_int_7, [coefficient_g], [lr, eps, weight_decay], apply, False, KERNELS)
    return ()
"""  # noqa: E501

# A momentum beside each weight, a weight decay on the matrices alone, two directions.
MOMENTUM = """
def forward(keys_0, keys_1, scale_0, scale_1, rounding_keys, coefficient_g, lr, eps, weight_decay, apply, w_0, slot_b_0, w_1, slot_b_1):
    select_int = aten.select.int(keys_0, 0, 0)
    select_int_1 = aten.select.int(keys_1, 0, 0)
    select_int_2 = aten.select.int(rounding_keys, 0, 0)
    update_ = zowrap.update_(w_0, [slot_b_0], [select_int, select_int_1], [scale_0, scale_1], [], select_int_2, [coefficient_g], [lr, eps, weight_decay], apply, True, KERNELS)
    select_int_3 = aten.select.int(keys_0, 0, 1)
    select_int_4 = aten.select.int(keys_1, 0, 1)
    select_int_5 = aten.select.int(rounding_keys, 0, 1)
    update__1 = zowrap.update_(w_1, [slot_b_1], [select_int_3, select_int_4], [scale_0, scale_1], [], select_int_5, [coefficient_g], [lr, eps, weight_decay], apply, False, KERNELS)
    return ()
"""  # noqa: E501

ALONG_FACTORS = """
def forward(rounding_keys, lr, eps, weight_decay, apply, w_0, left_0, right_0, w_1, left_1, w_2, left_2, right_2, w_3, left_3):
    select_int = aten.select.int(rounding_keys, 0, 0)
    update_lowrank_ = zowrap.update_lowrank_(w_0, [], left_0, right_0, select_int, [], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_1 = aten.select.int(rounding_keys, 0, 1)
    update_lowrank__1 = zowrap.update_lowrank_(w_1, [], left_1, None, select_int_1, [], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_2 = aten.select.int(rounding_keys, 0, 2)
    update_lowrank__2 = zowrap.update_lowrank_(w_2, [], left_2, right_2, select_int_2, [], [lr, eps, weight_decay], apply, False, KERNELS)
    select_int_3 = aten.select.int(rounding_keys, 0, 3)
    update_lowrank__3 = zowrap.update_lowrank_(w_3, [], left_3, None, select_int_3, [], [lr, eps, weight_decay], apply, False, KERNELS)
    return ()
"""  # noqa: E501

pytestmark = pytest.mark.filterwarnings("ignore:quantized='codes' rounds every write")


def epilogue_of(zm: zowrap.ZOModel, block: int = 0, points: int = 2) -> Epilogue:
    names = list(coefficient_shapes(zm.job, points))
    return build_epilogue(zm.job, block, kernels_of(zm), names, [])


def text(zm: zowrap.ZOModel, epilogue: Epilogue) -> str:
    program = captured(zm, numbers())
    program.history.append(("epilogue", str(epilogue.graph_module.code)))
    return printed(program, zm)


MODELS = {
    "noise": ({}, ALONG_NOISE),
    "momentum": ({"rule": rules.zo_sgd(momentum=0.9), "weight_decay": 0.1, "queries": 2, "blocks": ["b.*"]}, MOMENTUM),
    "factors": ({"direction": "lowrank(1)"}, ALONG_FACTORS),
}


@pytest.mark.parametrize(("options", "expected"), MODELS.values(), ids=MODELS)
def test_the_text_of_two_layers(options, expected) -> None:
    zm = wrap(TwoLayers(), **options)
    assert text(zm, epilogue_of(zm)) == expected.strip()


def updates(epilogue: Epilogue) -> dict[str, list[str]]:
    """Return the weights that each operator writes, in order."""
    found: dict[str, list[str]] = {}
    for node in epilogue.graph_module.graph.nodes:
        if node.op == "call_function" and "update" in str(node.target):
            found.setdefault(str(node.target).split(".")[1], []).append(node.args[0].name)
    return found


def test_each_active_parameter_is_written_once_and_nothing_else_is() -> None:
    zm = wrap(TwoLayers(), blocks=["a.*", "b.*"])
    assert updates(epilogue_of(zm, 0)) == {"update_": ["w_0", "w_1"]}
    assert updates(epilogue_of(zm, 1)) == {"update_": ["w_2", "w_3"]}
    assert updates(epilogue_of(wrap(TwoLayers(), direction="lowrank(2)"))) == {
        "update_lowrank_": ["w_0", "w_1", "w_2", "w_3"]
    }


def test_codes_are_written_by_an_operator_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(3, 4, has_fp16_weights=False), nn.LayerNorm(4)).to("cpu")
    zm = wrap(model, quantized="codes", trainable=["*weight"])
    epilogue = epilogue_of(zm)
    assert updates(epilogue)["update_codes_"] == ["w_0"]
    names = [node.name for node in epilogue.graph_module.graph.find_nodes(op="placeholder")]
    assert names[names.index("w_0") + 1] == "row_scale_0", "the scale of its rows comes after the codes"


def test_inputs_come_before_everything_else() -> None:
    epilogue = epilogue_of(wrap(TwoLayers(), rule=rules.zo_sgd(momentum=0.9)))
    kinds = [node.op for node in epilogue.graph_module.graph.nodes]
    assert kinds == sorted(kinds, key=["placeholder", "call_function", "output"].index)


def test_coefficients_have_the_shapes_that_the_rule_gives_them() -> None:
    assert coefficient_shapes(wrap(TwoLayers(), queries=3).job, 6) == {"g": torch.Size([3])}
    shapes = coefficient_shapes(wrap(TwoLayers(), rule="meazo").job, 2)
    assert shapes["g"] == torch.Size([1]) and all(shape == () for name, shape in shapes.items() if name != "g")


RUNS = {
    **{name: options for name, (options, _) in MODELS.items()},
    "blocks": {"rule": "meazo", "blocks": ["a.*", "b.*"]},
    "state of a rule": {"rule": "zo_adam"},
    "a rule that reads its momentum": {"rule": "conmezo"},
    "carried factors": {"rule": rules.lozo_m(rank=2, nu=2, beta1=0.5)},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_writes_what_the_eager_engine_writes(options, dtype) -> None:
    """Interpreted node by node, the epilogue and the oracle update alike for the same projected gradients."""
    models = []
    for engine in ("compiled", "eager"):
        torch.manual_seed(0)
        given = {"rule": "zo_sgd", "lr": 0.1, **options}
        zm = zowrap.zo_wrap(TwoLayers().to(dtype), loss_fn=mean_square, engine=engine, **given)
        draw = torch.Generator().manual_seed(1)
        for _ in range(4):
            zm.update(projected_grad=torch.randn(options.get("queries", 1), generator=draw))
        models.append(zm)
    one, other = models
    for mine, oracle in zip(one.parameters, other.parameters, strict=True):
        assert torch.allclose(mine.tensor, oracle.tensor, rtol=1e-5, atol=1e-6), mine.name
    state, expected = one.state_dict(), other.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


def test_appending_it_changes_no_evaluation_and_a_second_time_nothing() -> None:
    zm = wrap(TwoLayers())
    program, epilogue = captured(zm, numbers(), StripTraining()), epilogue_of(zm)
    once = after(program, AppendEpilogue(epilogue))
    twice = after(program, AppendEpilogue(epilogue), AppendEpilogue(epilogue))
    assert printed(once, zm) == printed(program, zm) == printed(twice, zm)
    assert once.epilogue is twice.epilogue is epilogue.graph_module
    assert once.notes["epilogue"].startswith("4 fused updates")
    assert "zowrap.update_" in once.code(), "inspect prints the whole step"
