"""The points of a step share one product with each quantised weight; the values equal those of separate products."""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes.nn
import pytest
import torch
from torch import Tensor, nn

from tests.support.programs import (
    after,
    captured,
    change,
    close,
    equal,
    evaluate,
    noise_directions,
    numbers,
    operators,
    printed,
    select,
    wrap,
)
from zowrap.errors import ZOInternalError
from zowrap.passes.lower_quantized import LowerQuantized
from zowrap.passes.perturb import Perturb
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, a_log_scale, b_bias, b_weight, b_log_scale, a_scb, b_scb, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(b_log_scale, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_2 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(a_log_scale, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    getitem_3 = theta_0[1]
    exp = aten.exp(getitem)
    exp_2 = aten.exp(getitem_3)
    mul = aten.mul.Tensor(a_scb, exp)
    mul_2 = aten.mul.Tensor(a_scb, exp_2)
    int8_linear = zowrap.int8_linear(batch_x, a_weight, mul, None, 0.0)
    int8_linear_2 = zowrap.int8_linear(batch_x, a_weight, mul_2, None, 0.0)
    tanh = aten.tanh(int8_linear)
    tanh_1 = aten.tanh(int8_linear_2)
    to = aten.to.dtype(b_bias, torch.float32)
    exp_1 = aten.exp(getitem_1)
    exp_3 = aten.exp(getitem_2)
    mul_1 = aten.mul.Tensor(b_scb, exp_1)
    mul_3 = aten.mul.Tensor(b_scb, exp_3)
    int8_linear_1 = zowrap.int8_linear(tanh, b_weight, mul_1, to, 0.0)
    int8_linear_3 = zowrap.int8_linear(tanh_1, b_weight, mul_3, to, 0.0)
    square = aten.square(int8_linear_1)
    square_1 = aten.square(int8_linear_3)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to_1 = aten.to.dtype(mean, torch.float32)
    to_2 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, to_2, ones_like)
"""

AFTER = """
def forward(a_weight, a_log_scale, b_bias, b_weight, b_log_scale, a_scb, b_scb, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(b_log_scale, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_2 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(a_log_scale, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    getitem_3 = theta_0[1]
    exp = aten.exp(getitem)
    exp_2 = aten.exp(getitem_3)
    mul = aten.mul.Tensor(a_scb, exp)
    mul_2 = aten.mul.Tensor(a_scb, exp_2)
    int8_points = zowrap.int8_points([batch_x], a_weight, [mul, mul_2], [], 0.0)
    getitem_4 = int8_points[0]
    getitem_5 = int8_points[1]
    tanh = aten.tanh(getitem_4)
    tanh_1 = aten.tanh(getitem_5)
    to = aten.to.dtype(b_bias, torch.float32)
    exp_1 = aten.exp(getitem_1)
    exp_3 = aten.exp(getitem_2)
    mul_1 = aten.mul.Tensor(b_scb, exp_1)
    mul_3 = aten.mul.Tensor(b_scb, exp_3)
    int8_points_1 = zowrap.int8_points([tanh, tanh_1], b_weight, [mul_1, mul_3], [to], 0.0)
    getitem_6 = int8_points_1[0]
    getitem_7 = int8_points_1[1]
    square = aten.square(getitem_6)
    square_1 = aten.square(getitem_7)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to_1 = aten.to.dtype(mean, torch.float32)
    to_2 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, to_2, ones_like)
"""

CODES_BEFORE = """
def forward(a_weight, b_bias, b_weight, a_scb, b_scb, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb_codes(b_weight, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_2 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb_codes(a_weight, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    getitem_3 = theta_0[1]
    int8_linear = zowrap.int8_linear(batch_x, getitem, a_scb, None, 0.0)
    int8_linear_2 = zowrap.int8_linear(batch_x, getitem_3, a_scb, None, 0.0)
    tanh = aten.tanh(int8_linear)
    tanh_1 = aten.tanh(int8_linear_2)
    to = aten.to.dtype(b_bias, torch.float32)
    int8_linear_1 = zowrap.int8_linear(tanh, getitem_1, b_scb, to, 0.0)
    int8_linear_3 = zowrap.int8_linear(tanh_1, getitem_2, b_scb, to, 0.0)
    square = aten.square(int8_linear_1)
    square_1 = aten.square(int8_linear_3)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to_1 = aten.to.dtype(mean, torch.float32)
    to_2 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, to_2, ones_like)
"""

CODES_AFTER = """
def forward(a_weight, b_bias, b_weight, a_scb, b_scb, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    select_int = aten.select.int(keys, 0, 0)
    codes_points = zowrap.codes_points([batch_x], a_weight, a_scb, [], 0.0, [], select_int, scale, [], coefficients, KERNELS)
    getitem_4 = codes_points[0]
    getitem_5 = codes_points[1]
    tanh = aten.tanh(getitem_4)
    tanh_1 = aten.tanh(getitem_5)
    to = aten.to.dtype(b_bias, torch.float32)
    codes_points_1 = zowrap.codes_points([tanh, tanh_1], b_weight, b_scb, [to], 0.0, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_6 = codes_points_1[0]
    getitem_7 = codes_points_1[1]
    square = aten.square(getitem_6)
    square_1 = aten.square(getitem_7)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to_1 = aten.to.dtype(mean, torch.float32)
    to_2 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, to_2, ones_like)
"""  # noqa: E501

pytestmark = pytest.mark.filterwarnings("ignore:quantized='codes' rounds every write")


class TwoQuantized(nn.Module):
    """A model of two 8-bit layers, the second with a bias."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        options = {"has_fp16_weights": False, "threshold": threshold}
        self.a = bitsandbytes.nn.Linear8bitLt(4, 3, bias=False, **options)
        self.b = bitsandbytes.nn.Linear8bitLt(3, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def quantized(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return TwoQuantized(**options).to("cpu")  # the library quantises in this call


def inputs(rows: int = 5) -> dict[str, Tensor]:
    return numbers(rows, 4)


@functools.cache
def prepared(quantization: str, points: int = 2, **options: Any):
    zm = wrap(quantized(**options), quantized=quantization)
    return zm, captured(zm, inputs(), StripTraining(), select(zm, points), SplitStreams(points), Perturb())


@pytest.mark.parametrize(
    ("quantization", "before", "lowered"),
    [("scales", BEFORE, AFTER), ("codes", CODES_BEFORE, CODES_AFTER)],
    ids=["scales", "codes"],
)
def test_the_text_of_two_layers(quantization, before, lowered) -> None:
    zm, program = prepared(quantization)
    assert printed(program, zm) == before.strip()
    assert printed(after(program, LowerQuantized()), zm) == lowered.strip()


def test_along_scales_the_points_share_each_product() -> None:
    _, program = prepared("scales")
    lowered = after(program, LowerQuantized())
    expected = {"getitem": 4, "zowrap.int8_linear": -4, "zowrap.int8_points": 2}
    assert change(operators(program), operators(lowered)) == expected
    note = "2 products shared, 0 along perturbed codes, 4 before"
    assert lowered.notes["lower_quantized"].startswith(note)


def test_along_codes_the_perturbed_codes_are_never_formed() -> None:
    _, program = prepared("codes")
    lowered = after(program, LowerQuantized())
    expected = {"zowrap.codes_points": 2, "zowrap.int8_linear": -4, "zowrap.perturb_codes": -2}
    assert change(operators(program), operators(lowered)) == expected
    note = "0 products shared, 2 along perturbed codes, 4 before"
    assert lowered.notes["lower_quantized"].startswith(note)


@pytest.mark.parametrize("points", [2, 3])
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["plain", "outliers"])
def test_along_scales_values_are_those_of_separate_products_bit_for_bit(points, threshold) -> None:
    zm, program = prepared("scales", points, threshold=threshold)
    lowered = after(program, LowerQuantized())
    for rows in (5, 3):
        assert equal(evaluate(lowered, zm, inputs(rows)), evaluate(program, zm, inputs(rows)))


@pytest.mark.parametrize("points", [2, 3])
def test_along_codes_the_change_of_the_weights_is_added_to_the_product_of_the_codes(points) -> None:
    """The oracle adds two products: the library's with the codes, and a plain one with the change of the weights."""
    zm, program = prepared("codes", points)
    lowered, batch = after(program, LowerQuantized()), inputs()
    *losses, _ = evaluate(lowered, zm, batch)
    first, second = noise_directions(zm)
    for loss, c in zip(losses, torch.linspace(0.1, -0.1, points), strict=True):
        hidden = torch.tanh(zm.model.a(batch["x"]) + batch["x"] @ (c * first).t())
        output = zm.model.b(hidden) + hidden @ (c * second).t()
        assert close([loss], [output.square().mean(-1)])


@pytest.mark.parametrize("quantization", ["scales", "codes"])
def test_a_second_time_nothing_is_left_to_do(quantization) -> None:
    zm, program = prepared(quantization)
    once, twice = after(program, LowerQuantized()), after(program, LowerQuantized(), LowerQuantized())
    assert printed(twice, zm) == printed(once, zm)


def test_one_point_keeps_the_product_of_a_lowered_layer() -> None:
    zm, program = prepared("scales", points=1)
    lowered = after(program, LowerQuantized())
    assert operators(lowered)["zowrap.int8_linear"] == 2 and operators(lowered)["zowrap.int8_points"] == 0
    assert equal(evaluate(lowered, zm, inputs()), evaluate(program, zm, inputs()))


def test_perturbed_codes_that_are_used_otherwise_break_the_promise() -> None:
    class Forgetful(LowerQuantized):
        def call(self, program) -> str:
            return "nothing done"

    _, program = prepared("codes")
    with pytest.raises(ZOInternalError, match="perturbed codes are left in the program"):
        after(program, Forgetful())
