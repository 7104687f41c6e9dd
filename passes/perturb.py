"""Fuse perturbations into matrix products, embeddings and heads, without forming the perturbed weight.

    before                                            after
    y_0 = linear(x_0, theta[0], b_0)                  p = zowrap.perturb_linear([x_0, x_1], w, key, …)
    y_1 = linear(x_1, theta[1], b_1)                  y_0 = p[0] + b_0;  y_1 = p[1] + b_1
    e_0 = zowrap.rows(theta[0], ids)                  e = zowrap.perturb_rows(w, ids, key, …)
    e_1 = zowrap.rows(theta[1], ids)                  e_0 = e[0];  e_1 = e[1]
    s_0 = zowrap.ops.head(x_0, theta[0], …)               s = zowrap.perturb_head([x_0, x_1], w, key, …)
    s_1 = zowrap.ops.head(x_1, theta[1], …)               s_0 = s[0];  s_1 = s[1]

Vectors keep ``zowrap.perturb``, because they are small. Uses without a cheaper form (convolutions, stacked expert
weights) keep it too, at the cost of one weight-sized temporary per point; the pass's note counts them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from zowrap.compiler.program import Program
from zowrap.passes.graph import Product, once, product_with, replace
from zowrap.passes.manager import Pass

aten = torch.ops.aten
Rewrite = Callable[["Perturb", fx.Graph, fx.Node, list[fx.Node]], list[fx.Node]]


class Perturb(Pass):
    """Replace uses of perturbed weights by fused operators; see the module docstring."""

    name = "perturb"

    def call(self, program: Program) -> str:
        graph = program.graph
        copies: dict[tuple[str, int], fx.Node] = {n.meta["copy_of"]: n for n in graph.nodes if "copy_of" in n.meta}
        counts = {"matrix products": 0, "embeddings": 0, "heads": 0, "whole vectors": 0, "whole tensors": 0}
        for theta in graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default):
            values = sorted((u for u in theta.users if u.target is operator.getitem), key=lambda n: n.args[1])  # type: ignore[arg-type]
            for use in list(values[0].users):
                if "copy_of" not in use.meta:  # an operator fused by an earlier pass
                    continue
                twins = [copies.get((use.meta["copy_of"][0], p)) for p in range(program.points)]
                kind = _rewrite(graph, theta, values, [t for t in twins if t is not None], program.points)
                if kind is not None:
                    counts[kind] += 1
            if any(v.users for v in values):
                weight = theta.args[0].meta["val"]  # type: ignore[union-attr]
                counts["whole vectors" if weight.ndim < 2 else "whole tensors"] += 1
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _rewrite(graph: fx.Graph, theta: fx.Node, values: list[fx.Node], uses: list[fx.Node], points: int) -> str | None:
    """Replace one use, given as its copies at all points, by a fused operator.

    Returns:
        The kind of use, or None if it has no cheaper form and stays.
    """
    weight = theta.args[0]
    if len(uses) != points or weight.meta["val"].ndim != 2:  # type: ignore[union-attr]
        return None
    first = uses[0]
    products = [p for use, value in zip(uses, values, strict=True) if (p := product_with(use, value)) is not None]
    if len(products) == points:
        _linear(graph, theta, uses, products)
        return "matrix products"
    if first.target is torch.ops.zowrap.head.default and first.args[1] is values[0]:
        _head(graph, theta, uses)
        return "heads"
    if first.target is torch.ops.zowrap.rows.default and first.args[0] is values[0]:
        ids = first.args[1]
        if any(u.args[1] is not ids for u in uses):
            return None
        _, slots, *rest = theta.args
        with graph.inserting_before(uses[0]):
            rows = graph.call_function(torch.ops.zowrap.perturb_rows.default, (weight, slots, ids, *rest))
        rows.meta["nn_module_stack"] = uses[0].meta.get("nn_module_stack")
        replace(graph, uses, rows)
        return "embeddings"
    return None


def _linear(graph: fx.Graph, theta: fx.Node, uses: list[fx.Node], products: list[Product]) -> None:
    weight, *rest, kernel_key = theta.args
    inputs, transposed = once([p.x for p in products]), products[0].transposed
    with graph.inserting_before(uses[-1]):
        product = graph.call_function(
            torch.ops.zowrap.perturb_linear.default, (inputs, weight, *rest, transposed, kernel_key)
        )
    product.meta["nn_module_stack"] = uses[0].meta.get("nn_module_stack")
    replace(graph, uses, product, [p.bias for p in products])


def _head(graph: fx.Graph, theta: fx.Node, uses: list[fx.Node]) -> None:
    weight, *rest, kernel_key = theta.args
    inputs, biases, labels = once([u.args[0] for u in uses]), once([u.args[2] for u in uses]), uses[0].args[5]
    with graph.inserting_before(uses[-1]):
        loss = graph.call_function(
            torch.ops.zowrap.perturb_head.default,
            (inputs, weight, [b for b in biases if b is not None], *rest, labels, kernel_key),
        )
    replace(graph, uses, loss)
