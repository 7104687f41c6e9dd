"""The graph helpers of passes: find perturbed weights, recognise products, share values between points."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from tests.support.programs import TwoLayers, captured, numbers, select, wrap
from zowrap.passes.graph import once, product_with, replace, tunable_values
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

aten = torch.ops.aten


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


@pytest.mark.parametrize("direction", ["gaussian", "lowrank(1)"])
@pytest.mark.parametrize("points", [1, 2])
def test_the_values_of_perturbed_weights_are_found_at_every_point(direction, points) -> None:
    zm = wrap(TwoLayers(), direction=direction)
    program = captured(zm, numbers(), StripTraining())
    assert tunable_values(program.graph) == []
    program = captured(zm, numbers(), StripTraining(), select(zm, points), SplitStreams(points))
    values = tunable_values(program.graph)
    assert len(values) == 4 * points and all(value.target is operator.getitem for value in values)
    assert sorted(value.args[1] for value in values) == sorted([*range(points)] * 4)


PRODUCTS = {
    "linear": (aten.linear.default, ("x", "w"), None, False),
    "linear with a bias": (aten.linear.default, ("x", "w", "b"), "b", False),
    "mm": (aten.mm.default, ("x", "w"), None, True),
    "matmul": (aten.matmul.default, ("x", "w"), None, True),
    "addmm": (aten.addmm.default, ("b", "x", "w"), "b", True),
}


@pytest.mark.parametrize(("target", "names", "bias", "transposed"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_with_a_weight_are_told_by_their_parts(graph, target, names, bias, transposed) -> None:
    nodes = {name: graph.placeholder(name) for name in ("x", "w", "b")}
    found = product_with(graph.call_function(target, tuple(nodes[name] for name in names)), nodes["w"])
    assert found == (nodes["x"], bias and nodes[bias], transposed)


OTHERS = {
    "the weight on the left": (aten.mm.default, ("w", "x"), {}),
    "the weight by itself": (aten.mm.default, ("w", "w"), {}),
    "linear of the weight by itself": (aten.linear.default, ("w", "w"), {}),
    "another weight": (aten.linear.default, ("x", "b"), {}),
    "no product": (aten.add.Tensor, ("x", "w"), {}),
    "a scaled product": (aten.addmm.default, ("b", "x", "w"), {"alpha": 2}),
}


@pytest.mark.parametrize(("target", "names", "options"), OTHERS.values(), ids=OTHERS)
def test_other_uses_of_a_weight_are_no_product_with_it(graph, target, names, options) -> None:
    nodes = {name: graph.placeholder(name) for name in ("x", "w", "b")}
    use = graph.call_function(target, tuple(nodes[name] for name in names), options)
    assert product_with(use, nodes["w"]) is None


def test_what_all_points_share_is_given_once(graph) -> None:
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert once([x, x, x]) == [x]
    assert once([x, y]) == [x, y] and once((None, None)) == [None]


def test_uses_are_replaced_by_the_outputs_of_one_operator_with_their_own_biases(graph) -> None:
    x, w, b = (graph.placeholder(name) for name in ("x", "w", "b"))
    uses = [graph.call_function(aten.linear.default, (x, w, b)), graph.call_function(aten.linear.default, (x, w))]
    for point, use in enumerate(uses):
        use.meta.update(copy_of=("linear", point), nn_module_stack={"a": ("a", nn.Linear)})
    total = graph.call_function(aten.add.Tensor, tuple(uses))
    graph.output(total)
    with graph.inserting_before(uses[0]):
        stacked = graph.call_function(aten.stack.default, ([x, x],))
        fused = graph.call_function(aten.matmul.default, (stacked, graph.call_function(aten.t.default, (w,))))
    replace(graph, uses, fused, [b, None])
    graph.lint()
    first, second = total.args
    assert first.target is aten.add.Tensor and first.args[1] is b
    assert second.target is operator.getitem and second.args == (fused, 1)
    assert [node.meta["copy_of"] for node in (first, second)] == [("linear", 0), ("linear", 1)]
    assert not graph.find_nodes(op="call_function", target=aten.linear.default)
    values = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    got = fx.GraphModule(nn.Module(), graph)(*values)
    product = values[0] @ values[1].t()
    assert torch.allclose(got, product + values[2] + product)
