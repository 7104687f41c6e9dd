"""Weights that broke during a run are told from those that were broken before."""

from __future__ import annotations

import math

import pytest
import torch

import zowrap
from tests.support.tiny_run import tiny_llama
from zowrap.training.weight_check import WeightCheck


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_weight_that_broke_is_named(value: float) -> None:
    parameters = zowrap.zo_wrap(tiny_llama(), engine="eager").parameters
    check = WeightCheck(parameters)
    assert check.find_broken(parameters) is None
    with torch.no_grad():
        parameters[3].tensor.view(-1)[1] = value
        parameters[2].tensor.view(-1)[0] = value
    assert check.find_broken(parameters) == parameters[2].name


def test_weights_that_were_broken_from_the_start_may_stay_so() -> None:
    parameters = zowrap.zo_wrap(tiny_llama(), engine="eager").parameters
    with torch.no_grad():
        parameters[0].tensor.view(-1)[:2] = math.nan
    check = WeightCheck(parameters)
    assert check.find_broken(parameters) is None
    with torch.no_grad():
        parameters[0].tensor.view(-1)[2] = math.nan
    assert check.find_broken(parameters) == parameters[0].name
