"""Each tunable weight is perturbed once, along its own direction, however many uses and names it has."""

from __future__ import annotations

import functools

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
    factor_directions,
    moved_losses,
    noise_directions,
    numbers,
    operators,
    printed,
    select,
    wrap,
)
from zowrap.errors import ZOInternalError
from zowrap.passes.select_tunable import UnusedBlock
from zowrap.passes.strip_training import StripTraining

BEFORE = """
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

AFTER = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, keys, scale, coefficients):
    select_int_3 = aten.select.int(keys, 0, 3)
    theta_3 = zowrap.perturb(b_bias, [], select_int_3, scale, [], coefficients, KERNELS)
    getitem_3 = theta_3[0]
    select_int_2 = aten.select.int(keys, 0, 2)
    theta_2 = zowrap.perturb(b_weight, [], select_int_2, scale, [], coefficients, KERNELS)
    getitem_2 = theta_2[0]
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(a_bias, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(a_weight, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    linear = aten.linear(batch_x, getitem, getitem_1)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, getitem_2, getitem_3)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""

# Low-rank directions: one input holds the factors of all parameters, and each takes its own part.
ALONG_FACTORS = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, factors, coefficients):
    slice_tensor_5 = aten.slice.Tensor(factors, 0, 160, 162)
    view_5 = aten.view(slice_tensor_5, [2, 1])
    theta_3 = zowrap.perturb_lowrank(b_bias, view_5, None, coefficients)
    getitem_3 = theta_3[0]
    slice_tensor_3 = aten.slice.Tensor(factors, 0, 96, 98)
    view_3 = aten.view(slice_tensor_3, [2, 1])
    slice_tensor_4 = aten.slice.Tensor(factors, 0, 128, 132)
    view_4 = aten.view(slice_tensor_4, [4, 1])
    theta_2 = zowrap.perturb_lowrank(b_weight, view_3, view_4, coefficients)
    getitem_2 = theta_2[0]
    slice_tensor_2 = aten.slice.Tensor(factors, 0, 64, 68)
    view_2 = aten.view(slice_tensor_2, [4, 1])
    theta_1 = zowrap.perturb_lowrank(a_bias, view_2, None, coefficients)
    getitem_1 = theta_1[0]
    slice_tensor = aten.slice.Tensor(factors, 0, 0, 4)
    view = aten.view(slice_tensor, [4, 1])
    slice_tensor_1 = aten.slice.Tensor(factors, 0, 32, 35)
    view_1 = aten.view(slice_tensor_1, [3, 1])
    theta_0 = zowrap.perturb_lowrank(a_weight, view, view_1, coefficients)
    getitem = theta_0[0]
    linear = aten.linear(batch_x, getitem, getitem_1)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, getitem_2, getitem_3)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""


TWO_LAYERS = TwoLayers()


@functools.cache
def prepared(model: nn.Module = TWO_LAYERS, **options):
    zm = wrap(model, **options)
    return zm, captured(zm, numbers(), StripTraining())


def test_the_text_of_two_layers() -> None:
    zm, program = prepared()
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, select(zm)), zm) == AFTER.strip()


def test_the_text_of_two_layers_along_low_rank_directions() -> None:
    zm, program = prepared(direction="lowrank(1)")
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, select(zm)), zm) == ALONG_FACTORS.strip()


def test_operators_and_inputs_that_come_in() -> None:
    zm, program = prepared()
    selected = after(program, select(zm))
    expected = {"aten.select.int": 4, "getitem": 4, "zowrap.perturb": 4}
    assert change(operators(program), operators(selected)) == expected
    added = [(each.kind, each.target) for each in selected.inputs[len(program.inputs) :]]
    assert added == [("added", "keys"), ("added", "scale"), ("added", "coefficients")]
    assert selected.notes["select_tunable"].startswith("4 of 4 tunable parameters take part in the loss")


def test_low_rank_directions_bring_one_input_and_a_part_of_it_for_each_factor() -> None:
    zm, program = prepared(direction="lowrank(2)")
    selected = after(program, select(zm))
    expected = {"aten.slice.Tensor": 6, "aten.view": 6, "getitem": 4, "zowrap.perturb_lowrank": 4}
    assert change(operators(program), operators(selected)) == expected
    assert [each.target for each in selected.inputs[len(program.inputs) :]] == ["factors", "coefficients"]


@pytest.mark.parametrize("direction", ["gaussian", "lowrank(2)"])
def test_the_loss_is_that_of_weights_moved_by_hand(direction) -> None:
    zm, program = prepared(direction=direction)
    selected = after(program, select(zm))
    along = noise_directions(zm) if direction == "gaussian" else factor_directions(zm)
    for rows in (5, 3):
        first, _ = moved_losses(zm, numbers(rows), along)
        loss, weights = evaluate(selected, zm, numbers(rows))
        assert close([loss], [first]) and torch.equal(weights, torch.ones(rows))
        assert not torch.allclose(evaluate(program, zm, numbers(rows))[0], first)


def test_a_rule_may_read_its_state_and_numbers_of_the_step() -> None:
    """The cone direction reads a momentum of the parameter's shape and two numbers of the step."""
    zm, program = prepared(rule="conmezo")
    names = ["momentum", "noise"]
    selected = after(program, select(zm, scalars=names))
    targets = [each.target for each in selected.inputs[len(program.inputs) :]]
    assert targets[:5] == ["keys", "scale", "coefficients", "scalar/momentum", "scalar/noise"]
    assert sorted(target.partition("/")[0] for target in targets[5:]) == ["slot"] * 4
    given = {t: drawn(t, zm.parameters[int(t.split("/")[2])].tensor.shape) for t in targets[5:]}
    scalars = {name: drawn(f"scalar/{name}", ()) for name in names}
    rule, along = zm.job.rule, []
    for i, (u, p) in enumerate(zip(noise_directions(zm), zm.parameters, strict=True)):
        (slot,) = rule.direction_slots
        along.append(rule.direction(u, p.tensor, {slot: given[f"slot/{slot}/{i}"]}, scalars))
    assert close(evaluate(selected, zm, numbers(), **given)[:1], moved_losses(zm, numbers(), along)[:1])


def test_a_rule_may_read_one_number_of_each_parameter() -> None:
    zm, program = prepared(rule="sparse_mezo")
    selected = after(program, select(zm))
    thresholds = {f"slot/threshold/{i}": torch.tensor(0.3) for i in range(4)}
    along = [
        torch.where(p.tensor.abs() <= 0.3, u, 0.0) for u, p in zip(noise_directions(zm), zm.parameters, strict=True)
    ]
    got = evaluate(selected, zm, numbers(), **thresholds)
    assert close(got[:1], moved_losses(zm, numbers(), along)[:1])


class Tied(nn.Module):
    """A model of two layers that share one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_a_tied_weight_is_perturbed_once() -> None:
    zm, program = prepared(Tied())
    selected = after(program, select(zm))
    assert operators(selected)["zowrap.perturb"] == 1
    (theta,) = selected.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default)
    (value,) = theta.users
    assert len(value.users) == 2, "both layers read the same perturbed weight"
    assert close(evaluate(selected, zm, numbers())[:1], moved_losses(zm, numbers(), noise_directions(zm))[:1])


def test_only_the_active_block_is_perturbed() -> None:
    zm, program = prepared(blocks=("a.*", "b.*"))
    for block, names in enumerate((["a.weight", "a.bias"], ["b.weight", "b.bias"])):
        selected = after(program, select(zm, block=block))
        thetas = selected.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default)
        assert sorted(zm.parameters[node.meta["parameter"]].name for node in thetas) == sorted(names)


class Unused(TwoLayers):
    """A model with a layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(4, 4)


def test_parameters_that_the_loss_does_not_read_are_left_out_and_counted() -> None:
    zm, program = prepared(Unused())
    selected = after(program, select(zm))
    assert operators(selected)["zowrap.perturb"] == 4
    assert selected.notes["select_tunable"].startswith("4 of 6 tunable parameters take part in the loss")


def test_a_block_that_the_loss_does_not_read_is_named() -> None:
    zm, program = prepared(Unused(), blocks=("a.*", "b.*", "pooler.*"))
    with pytest.raises(UnusedBlock, match=r"none of the tunable parameters of block 'pooler\.\*' takes part"):
        after(program, select(zm, block=2))


@pytest.mark.parametrize("direction", ["gaussian", "lowrank(1)"])
def test_a_second_time_is_refused(direction) -> None:
    """A second run would perturb each weight twice."""
    zm, program = prepared(direction=direction)
    with pytest.raises(ZOInternalError, match=r"pass select_tunable \(after select_tunable\) broke the program"):
        after(program, select(zm), select(zm))
