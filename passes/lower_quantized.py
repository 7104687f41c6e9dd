"""Compute the product with each quantised weight once for all points, so that its codes are read once.

    before                                                  after
    y_0 = zowrap.int8_linear(x_0, codes, scale_0, b, t)     p = zowrap.int8_points([x_0, x_1], codes, [scale_0, …], …)
    y_1 = zowrap.int8_linear(x_1, codes, scale_1, b, t)     y_0 = p[0];  y_1 = p[1]

    theta = zowrap.perturb_codes(codes, key, …)             p = zowrap.codes_points([x_0, x_1], codes, scale, …, key, …)
    y_0 = zowrap.int8_linear(x_0, theta[0], scale, b, t)    y_0 = p[0];  y_1 = p[1]

Integer sums are exact in any order and each row has its own scale, so the results equal those of separate products.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.program import Program
from zowrap.errors import ZOInternalError
from zowrap.passes.graph import once, replace
from zowrap.passes.manager import Pass


class LowerQuantized(Pass):
    """Merge the points' quantised products; see the module docstring."""

    name = "lower_quantized"

    def call(self, program: Program) -> str:
        graph = program.graph
        uses = graph.find_nodes(op="call_function", target=torch.ops.zowrap.int8_linear.default)
        twins: dict[str, list[fx.Node]] = {}
        for use in uses:
            if "copy_of" in use.meta:
                twins.setdefault(use.meta["copy_of"][0], []).append(use)
        stacked = perturbed = 0
        for group in twins.values():
            group.sort(key=lambda use: use.meta["copy_of"][1])
            theta = _theta(group[0].args[1])
            if theta is not None:
                _perturbed(graph, theta, group)
                perturbed += 1
            elif len(group) > 1:
                _stacked(graph, group)
                stacked += 1
        return f"{stacked} products shared, {perturbed} along perturbed codes, {len(uses)} before"

    def ensures(self, program: Program) -> None:
        if program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb_codes.default):
            raise ZOInternalError("perturbed codes are left in the program")


def _theta(codes: Any) -> fx.Node | None:
    """Return the ``perturb_codes`` node that a point's codes come from, or None."""
    source = codes.args[0] if codes.target is operator.getitem else None
    return source if source is not None and source.target is torch.ops.zowrap.perturb_codes.default else None


def _stacked(graph: fx.Graph, uses: list[fx.Node]) -> None:
    x, codes, scale, bias, threshold = zip(*(use.args for use in uses), strict=True)
    if len(set(codes)) > 1:
        raise ZOInternalError("the points of a step multiply by different codes")
    biases = [] if bias[0] is None else once(bias)
    _fuse(graph, uses, torch.ops.zowrap.int8_points.default, (once(x), codes[0], once(scale), biases, threshold[0]))


def _perturbed(graph: fx.Graph, theta: fx.Node, uses: list[fx.Node]) -> None:
    x, _, scale, bias, threshold = zip(*(use.args for use in uses), strict=True)
    codes, *direction = theta.args
    biases = [] if bias[0] is None else once(bias)
    arguments = (once(x), codes, scale[0], biases, threshold[0], *direction)
    _fuse(graph, uses, torch.ops.zowrap.codes_points.default, arguments)


def _fuse(graph: fx.Graph, uses: list[fx.Node], target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(uses[-1]):
        fused = graph.call_function(target, arguments)
    fused.meta["nn_module_stack"] = uses[0].meta.get("nn_module_stack")
    replace(graph, uses, fused)
