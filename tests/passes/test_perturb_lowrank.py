"""Low-rank directions become thin products; neither a perturbed weight nor a product of the factors is formed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.passes.test_perturb import TWO_LAYERS, Turned, Whole, Words, cross_entropy
from tests.support.programs import (
    TwoLayers,
    after,
    captured,
    change,
    close,
    drawn,
    evaluate,
    factor_directions,
    mean_square,
    moved_losses,
    numbers,
    operators,
    printed,
    select,
    tokens,
    wrap,
)
from zowrap.loss.module import Batch, LossFn
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.fuse_head import FuseHead
from zowrap.passes.perturb_lowrank import UNROLLED_RANK, PerturbLowRank
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, b_weight, batch_x, factors, coefficients):
    slice_tensor_2 = aten.slice.Tensor(factors, 0, 64, 66)
    view_2 = aten.view(slice_tensor_2, [2, 1])
    slice_tensor_3 = aten.slice.Tensor(factors, 0, 96, 100)
    view_3 = aten.view(slice_tensor_3, [4, 1])
    theta_1 = zowrap.perturb_lowrank(b_weight, view_2, view_3, coefficients)
    getitem_1 = theta_1[0]
    slice_tensor = aten.slice.Tensor(factors, 0, 0, 4)
    view = aten.view(slice_tensor, [4, 1])
    slice_tensor_1 = aten.slice.Tensor(factors, 0, 32, 35)
    view_1 = aten.view(slice_tensor_1, [3, 1])
    theta_0 = zowrap.perturb_lowrank(a_weight, view, view_1, coefficients)
    getitem = theta_0[0]
    linear = aten.linear(batch_x, getitem)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, getitem_1)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""

AFTER = """
def forward(a_weight, b_weight, batch_x, factors, coefficients):
    slice_tensor_2 = aten.slice.Tensor(factors, 0, 64, 66)
    view_2 = aten.view(slice_tensor_2, [2, 1])
    slice_tensor_3 = aten.slice.Tensor(factors, 0, 96, 100)
    view_3 = aten.view(slice_tensor_3, [4, 1])
    slice_tensor = aten.slice.Tensor(factors, 0, 0, 4)
    view = aten.view(slice_tensor, [4, 1])
    slice_tensor_1 = aten.slice.Tensor(factors, 0, 32, 35)
    view_1 = aten.view(slice_tensor_1, [3, 1])
    select_int_2 = aten.select.int(coefficients, 0, 0)
    linear_1 = aten.linear(batch_x, a_weight)
    matmul_1 = aten.matmul(batch_x, view_1)
    slice_tensor_5 = aten.slice.Tensor(matmul_1, -1, 0, 1)
    select_int_3 = aten.select.int(view, 1, 0)
    mul_tensor_2 = aten.mul.Tensor(slice_tensor_5, select_int_3)
    mul_tensor_3 = aten.mul.Tensor(mul_tensor_2, select_int_2)
    add_tensor_1 = aten.add.Tensor(linear_1, mul_tensor_3)
    tanh = aten.tanh(add_tensor_1)
    select_int = aten.select.int(coefficients, 0, 0)
    linear = aten.linear(tanh, b_weight)
    matmul = aten.matmul(tanh, view_3)
    slice_tensor_4 = aten.slice.Tensor(matmul, -1, 0, 1)
    select_int_1 = aten.select.int(view_2, 1, 0)
    mul_tensor = aten.mul.Tensor(slice_tensor_4, select_int_1)
    mul_tensor_1 = aten.mul.Tensor(mul_tensor, select_int)
    add_tensor = aten.add.Tensor(linear, mul_tensor_1)
    square = aten.square(add_tensor)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""


class TwoMatrices(TwoLayers):
    """A model of two layers without biases."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)


@functools.cache
def prepared(
    model: nn.Module,
    batch: Callable[[], Batch] = numbers,
    loss_fn: LossFn = mean_square,
    points: int = 2,
    rank: int = 1,
):
    zm = wrap(model, loss_fn, direction=f"lowrank({rank})")
    front = (StripTraining(), CheckLookups(), FuseHead())
    return zm, captured(zm, batch(), *front, select(zm, points), SplitStreams(points))


def test_the_text_of_two_layers() -> None:
    zm, program = prepared(TwoMatrices(), numbers, points=1)
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, PerturbLowRank()), zm) == AFTER.strip()


def test_operators_before_and_after() -> None:
    _, program = prepared(TWO_LAYERS)
    thin = after(program, PerturbLowRank())
    assert change(operators(program), operators(thin)) == {
        "aten.add.Tensor": 8,  # four parameters at two points
        "aten.matmul": 4,  # one for each of two matrices at two points
        "aten.mul.Tensor": 12,
        "aten.select.int": 12,
        "aten.slice.Tensor": 4,
        "aten.view": 4,
        "getitem": -8,
        "zowrap.perturb_lowrank": -4,
    }
    assert thin.notes["perturb_lowrank"].startswith("2 matrix products, 2 vectors")


def test_above_a_small_rank_the_outer_product_is_one_product() -> None:
    for rank in (UNROLLED_RANK, UNROLLED_RANK + 1):
        _, program = prepared(TwoMatrices(), numbers, rank=rank)
        count = operators(after(program, PerturbLowRank()))["aten.matmul"]
        assert count == (4 if rank == UNROLLED_RANK else 8)


CASES = {
    "two layers": (TWO_LAYERS, numbers, mean_square, "2 matrix products, 2 vectors", 0),
    "turned": (Turned(), numbers, mean_square, "3 matrix products, 1 vectors", 0),
    "words": (Words(), tokens, cross_entropy, "1 embeddings, 1 heads, 1 vectors", 0),
    "whole": (Whole(), numbers, mean_square, "2 whole tensors", 2),
}
by_case = pytest.mark.parametrize(("model", "batch", "loss_fn", "note", "whole"), CASES.values(), ids=CASES)


@by_case
def test_each_use_takes_its_thin_form(model, batch, loss_fn, note, whole) -> None:
    _, program = prepared(model, batch, loss_fn)
    thin = after(program, PerturbLowRank())
    assert thin.notes["perturb_lowrank"].startswith(f"{note} (")
    assert operators(thin)["zowrap.perturb_lowrank"] == whole


@by_case
@pytest.mark.parametrize(("points", "rank"), [(2, 1), (3, 6)])
def test_losses_are_those_of_the_program_before_and_of_weights_moved_by_hand(
    model, batch, loss_fn, note, whole, points, rank
) -> None:
    zm, program = prepared(model, batch, loss_fn, points, rank)
    thin = after(program, PerturbLowRank())
    for rows in (5, 3):
        *losses, weights = evaluate(thin, zm, batch(rows))
        *split, split_weights = evaluate(program, zm, batch(rows))
        assert close(losses, split) and torch.equal(weights, split_weights)
        assert close(losses, moved_losses(zm, batch(rows), factor_directions(zm), drawn("coefficients", (points,))))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-6)], ids=str)
def test_other_precisions(dtype, rtol) -> None:
    """A 16-bit product gets its change added in float32 and is rounded once; float64 keeps its precision."""

    def batch() -> Batch:
        return {"x": numbers()["x"].to(dtype)}

    zm, program = prepared(TwoLayers().to(dtype), batch)
    *losses, _ = evaluate(after(program, PerturbLowRank()), zm, batch())
    assert close(losses, moved_losses(zm, batch(), factor_directions(zm)), rtol)


@pytest.mark.parametrize("case", CASES)
def test_a_second_time_nothing_is_left_to_do(case) -> None:
    model, batch, loss_fn, *_ = CASES[case]
    zm, program = prepared(model, batch, loss_fn)
    once, twice = after(program, PerturbLowRank()), after(program, PerturbLowRank(), PerturbLowRank())
    assert printed(twice, zm) == printed(once, zm)
