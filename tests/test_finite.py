"""Weights that are not numbers are found by name, in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zowrap.errors import ZOError
from zowrap.finite import check_model, first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_element_is_found(dtype, value):
    good, bad = torch.randn(33, 7).to(dtype), torch.randn(65, 129).to(dtype)
    assert first_not_finite([("good", good), ("bad", bad)]) is None
    bad[40, 100] = value
    assert first_not_finite([("good", good), ("bad", bad)]) == "bad"
    assert first_not_finite([("transposed", bad.T)]) == "transposed"


def test_what_holds_no_numbers_passes():
    codes, empty = torch.zeros(3, dtype=torch.int8), torch.empty(0)
    assert first_not_finite([("codes", codes), ("empty", empty), ("meta", torch.empty(3, device="meta"))]) is None


def test_the_message_names_the_weight_as_the_model_has_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    check_model(model)
    model[1].bias.data[0] = math.nan
    with pytest.raises(ZOError, match=r"^1\.bias of the model holds values that are not finite"):
        check_model(model)
