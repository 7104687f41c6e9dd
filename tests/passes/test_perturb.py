"""No perturbed copy of a matrix is formed: products, look-ups and heads add the noise themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.programs import (
    TwoLayers,
    after,
    captured,
    change,
    close,
    drawn,
    evaluate,
    mean_square,
    moved_losses,
    noise_directions,
    numbers,
    operators,
    printed,
    select,
    tokens,
    wrap,
)
from zowrap.loss.module import Batch, LossFn, token_losses
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.fuse_head import LEAST_CLASSES, FuseHead
from zowrap.passes.perturb import Perturb
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, keys, scale, coefficients):
    select_int_3 = aten.select.int(keys, 0, 3)
    theta_3 = zowrap.perturb(b_bias, [], select_int_3, scale, [], coefficients, KERNELS)
    getitem_3 = theta_3[0]
    getitem_4 = theta_3[1]
    select_int_2 = aten.select.int(keys, 0, 2)
    theta_2 = zowrap.perturb(b_weight, [], select_int_2, scale, [], coefficients, KERNELS)
    getitem_2 = theta_2[0]
    getitem_5 = theta_2[1]
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(a_bias, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_6 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(a_weight, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    getitem_7 = theta_0[1]
    linear = aten.linear(batch_x, getitem, getitem_1)
    linear_2 = aten.linear(batch_x, getitem_7, getitem_6)
    tanh = aten.tanh(linear)
    tanh_1 = aten.tanh(linear_2)
    linear_1 = aten.linear(tanh, getitem_2, getitem_3)
    linear_3 = aten.linear(tanh_1, getitem_5, getitem_4)
    square = aten.square(linear_1)
    square_1 = aten.square(linear_3)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to = aten.to.dtype(mean, torch.float32)
    to_1 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, to_1, ones_like)
"""

AFTER = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, keys, scale, coefficients):
    select_int_3 = aten.select.int(keys, 0, 3)
    theta_3 = zowrap.perturb(b_bias, [], select_int_3, scale, [], coefficients, KERNELS)
    getitem_3 = theta_3[0]
    getitem_4 = theta_3[1]
    select_int_2 = aten.select.int(keys, 0, 2)
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(a_bias, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_6 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    perturb_linear_1 = zowrap.perturb_linear([batch_x], a_weight, [], select_int, scale, [], coefficients, False, KERNELS)
    getitem_10 = perturb_linear_1[0]
    add_tensor_2 = aten.add.Tensor(getitem_10, getitem_1)
    getitem_11 = perturb_linear_1[1]
    add_tensor_3 = aten.add.Tensor(getitem_11, getitem_6)
    tanh = aten.tanh(add_tensor_2)
    tanh_1 = aten.tanh(add_tensor_3)
    perturb_linear = zowrap.perturb_linear([tanh, tanh_1], b_weight, [], select_int_2, scale, [], coefficients, False, KERNELS)
    getitem_8 = perturb_linear[0]
    add_tensor = aten.add.Tensor(getitem_8, getitem_3)
    getitem_9 = perturb_linear[1]
    add_tensor_1 = aten.add.Tensor(getitem_9, getitem_4)
    square = aten.square(add_tensor)
    square_1 = aten.square(add_tensor_1)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to = aten.to.dtype(mean, torch.float32)
    to_1 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, to_1, ones_like)
"""  # noqa: E501


@functools.cache
def prepared(model: nn.Module, batch: Callable[[], Batch] = numbers, loss_fn: LossFn = mean_square, points: int = 2):
    zm = wrap(model, loss_fn)
    front = (StripTraining(), CheckLookups(), FuseHead())
    return zm, captured(zm, batch(), *front, select(zm, points), SplitStreams(points))


def test_the_text_of_two_layers() -> None:
    zm, program = prepared(TWO_LAYERS)
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, Perturb()), zm) == AFTER.strip()


def test_the_points_of_a_step_share_one_product_of_each_matrix() -> None:
    _, program = prepared(TWO_LAYERS)
    fused = after(program, Perturb())
    assert change(operators(program), operators(fused)) == {
        "aten.add.Tensor": 4,
        "aten.linear": -4,
        "zowrap.perturb": -2,
        "zowrap.perturb_linear": 2,
    }
    assert fused.notes["perturb"].startswith("2 matrix products, 2 whole vectors")


def test_an_input_that_all_points_share_is_given_once() -> None:
    _, program = prepared(TWO_LAYERS)
    nodes = after(program, Perturb()).graph.find_nodes(
        op="call_function", target=torch.ops.zowrap.perturb_linear.default
    )
    assert [len(node.args[0]) for node in nodes] == [1, 2]  # the batch, then the first layer's output at each point


TWO_LAYERS = TwoLayers()


class Turned(nn.Module):
    """A model with matrices of shape [inputs, outputs], used by ``addmm``, ``mm`` and ``matmul``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (4, 4), (4, 2)))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(torch.mm(torch.addmm(self.bias, x, self.a), self.b).unsqueeze(1), self.c).squeeze(1)


class Words(nn.Module):
    """A model with an embedding and a vocabulary head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, LEAST_CLASSES, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(ids))


def cross_entropy(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return token_losses(model(batch["ids"]), batch["labels"])[0]


class Whole(nn.Module):
    """A model with a convolution and a matrix that is also read directly; neither has a cheaper form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv1d(1, 2, 3, padding=1, bias=False), nn.Parameter(torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.unsqueeze(1)).flatten(1)
        return y @ torch.tanh(self.mix)


WORDS = {"perturb_rows": 1, "perturb_head": 1}
CASES = {
    "two layers": (TWO_LAYERS, numbers, mean_square, "2 matrix products, 2 whole vectors", {"perturb_linear": 2}),
    "turned": (Turned(), numbers, mean_square, "3 matrix products, 1 whole vectors", {"perturb_linear": 3}),
    "words": (Words(), tokens, cross_entropy, "1 embeddings, 1 heads, 1 whole vectors", WORDS),
    "no bias": (Words(False), tokens, cross_entropy, "1 embeddings, 1 heads", WORDS),
    "whole": (Whole(), numbers, mean_square, "2 whole tensors", {"perturb": 2}),
}
by_case = pytest.mark.parametrize(("model", "batch", "loss_fn", "note", "fused"), CASES.values(), ids=CASES)


@by_case
def test_each_use_takes_its_cheapest_form(model, batch, loss_fn, note, fused) -> None:
    _, program = prepared(model, batch, loss_fn)
    perturbed = after(program, Perturb())
    assert perturbed.notes["perturb"].startswith(f"{note} (")
    assert {name: operators(perturbed)[f"zowrap.{name}"] for name in fused} == fused
    for node in perturbed.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default):
        assert node.args[0].meta["val"].ndim < 2 or "whole tensors" in note


@by_case
@pytest.mark.parametrize("points", [2, 3])
def test_losses_are_those_of_the_program_before_and_of_weights_moved_by_hand(
    model, batch, loss_fn, note, fused, points
) -> None:
    zm, program = prepared(model, batch, loss_fn, points)
    perturbed = after(program, Perturb())
    for rows in (5, 3):
        *losses, weights = evaluate(perturbed, zm, batch(rows))
        *split, split_weights = evaluate(program, zm, batch(rows))
        assert close(losses, split) and torch.equal(weights, split_weights)
        assert close(losses, moved_losses(zm, batch(rows), noise_directions(zm), drawn("coefficients", (points,))))


def test_sixteen_bit_weights_are_perturbed_and_then_rounded() -> None:
    def batch() -> Batch:
        return {"x": numbers()["x"].bfloat16()}

    zm, program = prepared(TwoLayers().bfloat16(), batch)
    *losses, _ = evaluate(after(program, Perturb()), zm, batch())
    assert close(losses, moved_losses(zm, batch(), noise_directions(zm)), rtol=2e-2)
    assert close(losses, evaluate(program, zm, batch())[:-1], rtol=2e-2)


@pytest.mark.parametrize("case", ["two layers", "turned", "no bias", "whole"])
def test_a_second_time_nothing_is_left_to_do(case) -> None:
    model, batch, loss_fn, *_ = CASES[case]
    zm, program = prepared(model, batch, loss_fn)
    once, twice = after(program, Perturb()), after(program, Perturb(), Perturb())
    assert printed(twice, zm) == printed(once, zm)
