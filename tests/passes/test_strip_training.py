"""Dropout, assertions and aliases are removed from the program; operators that draw random numbers are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.programs import (
    TwoLayers,
    after,
    captured,
    change,
    equal,
    evaluate,
    numbers,
    operators,
    printed,
    wrap,
)
from zowrap.errors import ZOCaptureError
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x):
    linear = aten.linear(batch_x, a_weight, a_bias)
    tanh = aten.tanh(linear)
    dropout = aten.dropout(tanh, 0.1, False)
    slice_1 = aten.slice.Tensor(dropout, 0, 0, 9223372036854775807)
    detach = aten.detach(slice_1)
    linear_1 = aten.linear(detach, b_weight, b_bias)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    _assert_tensor_metadata = aten._assert_tensor_metadata(mean, dtype = torch.float32, device = device(type='cpu'), layout = torch.strided)
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""  # noqa: E501

AFTER = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x):
    linear = aten.linear(batch_x, a_weight, a_bias)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, b_weight, b_bias)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""


class Trained(TwoLayers):
    """A model of two layers, with all kinds of nodes that the pass removes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.a(x)))[:].detach())


@pytest.fixture
def zm():
    return wrap(Trained())


@pytest.fixture
def program(zm):
    return captured(zm, numbers())


def test_the_text_of_two_layers(zm, program) -> None:
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, StripTraining()), zm) == AFTER.strip()


def test_what_goes_is_counted(program) -> None:
    stripped = after(program, StripTraining())
    assert change(operators(program), operators(stripped)) == {
        "aten._assert_tensor_metadata": -1,
        "aten.detach": -1,
        "aten.dropout": -1,
        "aten.slice.Tensor": -1,
    }
    assert stripped.notes["strip_training"].startswith("removed 1 assertions and 3 aliases or inactive dropouts")


def test_no_number_changes(zm, program) -> None:
    stripped = after(program, StripTraining())
    for rows in (5, 3, 1):
        assert equal(evaluate(stripped, zm, numbers(rows)), evaluate(program, zm, numbers(rows)))


def test_a_second_time_nothing_is_left_to_do(zm, program) -> None:
    once, twice = after(program, StripTraining()), after(program, StripTraining(), StripTraining())
    assert printed(twice, zm) == printed(once, zm)


def test_a_slice_that_leaves_something_out_stays() -> None:
    class Cut(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 1:]

    stripped = captured(wrap(Cut()), numbers(), StripTraining())
    assert operators(stripped)["aten.slice.Tensor"] == 1


class Noisy(TwoLayers):
    """A model with a dropout that evaluation mode does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(torch.tanh(self.a(x)), 0.1, training=True))


class Attending(TwoLayers):
    """A model with dropout inside its attention."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x)).view(-1, 1, 2, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=self.probability)
        return self.b(y.reshape(-1, 4))


@pytest.mark.parametrize("model", [Noisy(), Attending(0.1)], ids=["dropout", "attention"])
def test_a_model_that_draws_random_numbers_is_refused(model) -> None:
    with pytest.raises(ZOCaptureError, match="draws random numbers in evaluation mode"):
        captured(wrap(model), numbers(), StripTraining())


def test_attention_without_dropout_draws_nothing() -> None:
    stripped = captured(wrap(Attending(0.0)), numbers(), StripTraining())
    assert operators(stripped)["aten.scaled_dot_product_attention"] == 1
