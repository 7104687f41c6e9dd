"""Weights that are not numbers are found by name, in one pass."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from tests.support.tiny_run import tiny_llama, trainer_in, weights_of
from zowrap.errors import ZOWarning
from zowrap.step.finite import find_not_finite, warn_about


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_element_is_found(dtype, value):
    good, bad = torch.randn(33, 7).to(dtype), torch.randn(65, 129).to(dtype)
    assert find_not_finite([("good", good), ("bad", bad)]) == {}
    bad[40, 100] = value
    assert find_not_finite([("good", good), ("bad", bad)]) == {"bad": 1}
    assert find_not_finite([("transposed", bad.T)]) == {"transposed": 1}


def test_what_holds_no_numbers_passes():
    codes, empty = torch.zeros(3, dtype=torch.int8), torch.empty(0)
    assert find_not_finite([("codes", codes), ("empty", empty), ("meta", torch.empty(3, device="meta"))]) == {}


def test_the_warning_names_the_weight_as_the_model_has_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about(model)
    model[1].bias.data[0] = math.nan
    with pytest.warns(ZOWarning, match=r"^the model's own 1\.bias holds 1 values that are not finite"):
        warn_about(model)


def test_a_run_goes_on_past_rows_that_the_base_model_has_no_numbers_for(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = math.nan
    with pytest.warns(ZOWarning, match=r"embed_tokens\.weight holds 16 values that are not finite"):
        output = trainer_in(tmp_path, model, eval_dataset=None, seed=5).train()
    assert output.global_step == 24 and 0 < output.metrics["skipped_steps"] < 24
    assert int(weights_of(tmp_path)["model.safetensors/model.embed_tokens.weight"].isnan().sum()) == 16
