"""Copy the evaluation for each point; nodes that no perturbation reaches stay single and are shared.

    before                            after
    m = mask(ids)                     m = mask(ids)                        # untainted: computed once
    y = linear(x, theta[0])           y_0 = linear(x, theta[0]);  y_1 = linear(x, theta[1])
    s = attention(y, m)               s_0 = attention(y_0, m);    s_1 = attention(y_1, m)
    return sums(s), weights           return sums(s_0), sums(s_1), weights

A node is *tainted* if it depends on a perturbed weight. Only tainted nodes are copied. With one active block, the
points share everything below the block and every mask and position embedding.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, cast

import torch
from torch import fx

from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.passes.graph import tunable_values
from zowrap.passes.manager import Pass


class SplitStreams(Pass):
    """Copy tainted nodes for each point; see the module docstring."""

    name = "split_streams"

    def __init__(self, points: int) -> None:
        self.points = points

    def requires(self, program: Program) -> None:
        if program.points != 1 or not tunable_values(program.graph):
            raise ZOInternalError("the program must be one evaluation of perturbed weights")

    def call(self, program: Program) -> str:
        graph = program.graph
        sources = set(tunable_values(graph))
        tainted = _tainted(graph, sources)
        copies_of: dict[fx.Node, list[fx.Node]] = {}

        def at(node: Any, point: int) -> Any:
            return copies_of[node][point] if node in copies_of else node

        for node in list(graph.nodes):
            if node not in tainted:
                continue
            copies = [node]  # the original serves point 0; the copies follow it directly, so order stays topological
            for point in range(1, self.points):
                with graph.inserting_after(copies[-1]):
                    if node in sources:
                        copy = graph.call_function(operator.getitem, (node.args[0], point))
                    else:
                        copy = graph.node_copy(node, functools.partial(at, point=point))
                copies.append(copy)
            for point, copy in enumerate(copies):
                copy.meta = dict(node.meta)
                copy.meta["copy_of"] = (node.name, point)
            copies_of[node] = copies
        sums, weights = cast("tuple[fx.Node, fx.Node]", graph.output_node().args[0])
        graph.output_node().args = ((*[at(sums, p) for p in range(self.points)], at(weights, 0)),)
        program.points = self.points
        total = sum(n.op == "call_function" for n in graph.nodes)
        return f"{len(tainted)} nodes at {self.points} points, {total - self.points * len(tainted)} shared"


# Operators that read a number out of a tensor. All other numbers that a program computes are sizes.
_READ = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


def _tainted(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """Return the tensor-valued nodes that depend on a perturbed weight.

    Nodes that compute sizes are not tainted: sizes are the same at every point, so those of the first point serve all.

    Raises:
        ZOCaptureError: the model reads a number (``.item()``) out of a tainted tensor, which differs at each point.
    """
    tainted = set(sources)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in tainted for n in node.all_input_nodes):
            if node.target in _READ:
                raise ZOCaptureError(
                    "the model turns a tensor that depends on the moving weights into a Python number (.item(), "
                    "float()), and that number differs from point to point"
                )
            value = node.meta.get("val")
            if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
                tainted.add(node)
    return tainted
