"""Each point has its own copy of the evaluation; nodes that no perturbation reaches are computed once."""

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
    equal,
    evaluate,
    moved_losses,
    noise_directions,
    numbers,
    operators,
    printed,
    select,
    wrap,
)
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(b_bias, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(b_weight, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    linear = aten.linear(batch_x, a_weight, a_bias)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, getitem, getitem_1)
    square = aten.square(linear_1)
    mean = aten.mean.dim(square, [-1])
    to = aten.to.dtype(mean, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, ones_like)
"""

AFTER = """
def forward(a_weight, a_bias, b_weight, b_bias, batch_x, keys, scale, coefficients):
    select_int_1 = aten.select.int(keys, 0, 1)
    theta_1 = zowrap.perturb(b_bias, [], select_int_1, scale, [], coefficients, KERNELS)
    getitem_1 = theta_1[0]
    getitem_2 = theta_1[1]
    select_int = aten.select.int(keys, 0, 0)
    theta_0 = zowrap.perturb(b_weight, [], select_int, scale, [], coefficients, KERNELS)
    getitem = theta_0[0]
    getitem_3 = theta_0[1]
    linear = aten.linear(batch_x, a_weight, a_bias)
    tanh = aten.tanh(linear)
    linear_1 = aten.linear(tanh, getitem, getitem_1)
    linear_2 = aten.linear(tanh, getitem_3, getitem_2)
    square = aten.square(linear_1)
    square_1 = aten.square(linear_2)
    mean = aten.mean.dim(square, [-1])
    mean_1 = aten.mean.dim(square_1, [-1])
    to = aten.to.dtype(mean, torch.float32)
    to_1 = aten.to.dtype(mean_1, torch.float32)
    ones_like = aten.ones_like(to, pin_memory = False)
    return (to, to_1, ones_like)
"""


TWO_LAYERS = TwoLayers()


@functools.cache
def prepared(model: nn.Module = TWO_LAYERS, points: int = 2, block: int = 0, **options):
    zm = wrap(model, **options)
    return zm, captured(zm, numbers(), StripTraining(), select(zm, points, block))


def test_the_text_of_two_layers() -> None:
    zm, program = prepared(blocks=("b.*",))
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, SplitStreams(2)), zm) == AFTER.strip()


@pytest.mark.parametrize("points", [1, 2, 3])
def test_each_point_has_its_own_copy_of_what_moves(points) -> None:
    _, program = prepared(points=points)
    split = after(program, SplitStreams(points))
    per_point = {
        "aten.linear": 2,
        "aten.mean.dim": 1,
        "aten.square": 1,
        "aten.tanh": 1,
        "aten.to.dtype": 1,
        "getitem": 4,
    }
    expected = {name: count * (points - 1) for name, count in per_point.items() if points > 1}
    assert change(operators(program), operators(split)) == expected
    assert split.points == points and len(split.graph.output_node().args[0]) == points + 1


def test_below_the_active_block_everything_is_shared() -> None:
    _, program = prepared(blocks=("a.*", "b.*"), block=1)
    split = after(program, SplitStreams(2))
    added = change(operators(program), operators(split))
    assert added["aten.linear"] == 1 and "aten.tanh" not in added
    assert split.notes["split_streams"].startswith("7 nodes at 2 points, 6 shared")


def test_what_comes_of_the_batch_alone_is_computed_once() -> None:
    class Masked(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            positions = (x > 0).cumsum(1).to(x.dtype)  # as a transformer derives them from its mask
            return self.b(torch.tanh(self.a(x + positions))) * positions.sum(1, keepdim=True)

    zm, program = prepared(Masked())
    split = after(program, SplitStreams(2))
    assert {"aten.cumsum", "aten.gt.Scalar", "aten.sum.dim_IntList"}.isdisjoint(
        change(operators(program), operators(split))
    )
    assert operators(split)["aten.cumsum"] == 1 and operators(split)["aten.tanh"] == 2
    *losses, _ = evaluate(split, zm, numbers(3))
    assert close(losses, moved_losses(zm, numbers(3), noise_directions(zm)))


@pytest.mark.parametrize("points", [1, 2, 3])
def test_each_copy_is_the_loss_at_its_own_point(points) -> None:
    zm, program = prepared(points=points)
    split = after(program, SplitStreams(points))
    for rows in (5, 3):
        *losses, weights = evaluate(split, zm, numbers(rows))
        assert close(losses, moved_losses(zm, numbers(rows), noise_directions(zm), drawn("coefficients", (points,))))
        assert equal([losses[0], weights], evaluate(program, zm, numbers(rows)))


def test_every_copy_says_which_node_and_point_it_is() -> None:
    _, program = prepared()
    split = after(program, SplitStreams(2))
    copies: dict[str, list[int]] = {}
    for node in split.graph.nodes:
        if "copy_of" in node.meta:
            copies.setdefault(node.meta["copy_of"][0], []).append(node.meta["copy_of"][1])
    assert copies.pop("ones_like") == [0], "the weights of the rows are those of the first point"
    assert len(copies) == 10 and all(points == [0, 1] for points in copies.values())


def test_sizes_are_the_same_at_every_point() -> None:
    class Counted(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.sum(0, keepdim=True).expand(x.shape[0], 2) / y.shape[0]

    zm, program = prepared(Counted())
    split = after(program, SplitStreams(2))
    assert operators(split)["aten.sym_size.int"] == operators(program)["aten.sym_size.int"]
    *losses, _ = evaluate(split, zm, numbers(3))
    assert close(losses, moved_losses(zm, numbers(3), noise_directions(zm)))


def test_a_second_time_is_refused() -> None:
    _, program = prepared()
    with pytest.raises(ZOInternalError, match="must be one evaluation of perturbed weights"):
        after(program, SplitStreams(2), SplitStreams(2))


def test_a_program_without_perturbed_weights_is_refused() -> None:
    program = captured(wrap(TwoLayers()), numbers(), StripTraining())
    with pytest.raises(ZOInternalError, match=r"pass split_streams \(as the first pass\).*of perturbed weights"):
        after(program, SplitStreams(2))


def test_a_python_number_of_what_moves_is_refused() -> None:
    """The number differs at each point, and Python can follow only one value."""
    _, program = prepared()
    program = program.clone()
    (mean,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)
    with program.graph.inserting_after(mean):
        program.graph.call_function(torch.ops.aten.item.default, (mean,))
    with pytest.raises(ZOCaptureError, match=r"turns a tensor that depends on the moving weights into a Python number"):
        after(program, SplitStreams(2))
