"""One evaluation → one stream per point; what no perturbation reaches stays single.

    before                            after
    m = mask(ids)                     m = mask(ids)                        # untainted: computed once
    y = linear(x, theta[0])           y_0 = linear(x, theta[0]);  y_1 = linear(x, theta[1])
    s = attention(y, m)               s_0 = attention(y_0, m);    s_1 = attention(y_1, m)
    return sums(s), weights           return sums(s_0), sums(s_1), weights

A node is *tainted* if a perturbed weight reaches it. Only tainted nodes are copied; with one active block everything
below the block, and every mask and position embedding, is shared.
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
    """See the module."""

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
        streams: dict[fx.Node, list[fx.Node]] = {}

        def at(node: Any, point: int) -> Any:
            return streams[node][point] if node in streams else node

        for node in list(graph.nodes):
            if node not in tainted:
                continue
            copies = [node]  # the original is the first stream; each copy follows at once, so order stays topological
            for point in range(1, self.points):
                with graph.inserting_after(copies[-1]):
                    if node in sources:
                        copy = graph.call_function(operator.getitem, (node.args[0], point))
                    else:
                        copy = graph.node_copy(node, functools.partial(at, point=point))
                copies.append(copy)
            for point, copy in enumerate(copies):
                copy.meta = dict(node.meta)
                copy.meta["stream"] = (node.name, point)
            streams[node] = copies
        sums, weights = cast("tuple[fx.Node, fx.Node]", graph.output_node().args[0])
        graph.output_node().args = ((*[at(sums, p) for p in range(self.points)], at(weights, 0)),)
        program.points = self.points
        total = sum(n.op == "call_function" for n in graph.nodes)
        return f"{len(tainted)} nodes in {self.points} streams, {total - self.points * len(tainted)} shared"


# Numbers read out of tensors; other numbers that a program computes are sizes.
_READ = {torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


def _tainted(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """Tensor-valued nodes that a perturbed weight reaches. Sizes are the same in every stream: the first's serve.

    Raises:
        ZOCaptureError: the model reads a number out of one (``.item()``): each stream has its own.
    """
    tainted = set(sources)
    for node in graph.nodes:
        if node.op == "call_function" and any(n in tainted for n in node.all_input_nodes):
            if node.target in _READ:
                raise ZOCaptureError(
                    "the model makes a Python number of a tensor that depends on what moves (.item(), float()), and "
                    "that is another one at each point"
                )
            value = node.meta.get("val")
            if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
                tainted.add(node)
    return tainted
