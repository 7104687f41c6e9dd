"""Graph helpers shared by several passes: find perturbed weights, recognise products, replace uses at all points."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op

aten = torch.ops.aten


def tunable_values(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that represent a perturbed weight at one point."""
    return [
        user
        for perturbation in custom_op.with_trait("perturbs")
        for node in graph.find_nodes(op="call_function", target=perturbation.overload)
        for user in node.users
        if user.target is operator.getitem
    ]


class Product(NamedTuple):
    """``x · weightᵀ + bias``; if ``transposed``, ``x · weight + bias`` with a weight of shape [inputs, outputs]."""

    x: Any
    bias: Any
    transposed: bool


def product_with(use: fx.Node, weight: fx.Node) -> Product | None:
    """Return ``use`` as a product of another value with the matrix ``weight``, or None if it is not one."""
    args = use.args
    if use.target is aten.linear.default and args[1] is weight and args[0] is not weight:
        return Product(args[0], args[2] if len(args) > 2 else None, transposed=False)
    if use.target is aten.addmm.default and args[2] is weight and args[1] is not weight and not use.kwargs:
        return Product(args[1], args[0], transposed=True)
    if use.target in (aten.mm.default, aten.matmul.default) and args[1] is weight and args[0] is not weight:
        return Product(args[0], None, transposed=True)
    return None


def reached(graph: fx.Graph, sources: Collection[fx.Node]) -> set[fx.Node]:
    """Return ``sources`` and every node computed from their values, not only from their sizes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in sources or (node.target is not aten.sym_size.int and found & set(node.all_input_nodes)):
            found.add(node)
    return found


def once(values: Sequence[Any]) -> list[Any]:
    """Return the points' values, reduced to a single one if all points share it."""
    return [values[0]] if all(v is values[0] for v in values) else list(values)


def replace(graph: fx.Graph, uses: Sequence[fx.Node], fused: fx.Node, biases: Sequence[Any] | None = None) -> None:
    """Replace ``uses``, one for each point, by the outputs of ``fused``, with each point's bias added."""
    after = fused
    for p, use in enumerate(uses):
        with graph.inserting_after(after):
            value = after = graph.call_function(operator.getitem, (fused, p))
        if biases is not None and biases[p] is not None:
            value.meta["nn_module_stack"] = use.meta.get("nn_module_stack")
            with graph.inserting_after(value):
                value = after = graph.call_function(aten.add.Tensor, (value, biases[p]))
        value.meta = dict(use.meta)
        use.replace_all_uses_with(value)
    for use in uses:
        graph.erase_node(use)
