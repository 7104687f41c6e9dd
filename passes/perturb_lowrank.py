"""Apply low-rank directions to the activations, without forming the perturbed weight or U Vᵀ.

    before                                 after
    y_0 = linear(x_0, theta[0], b_0)       y_0 = linear(x_0, w, b_0) + ((x_0 right) leftᵀ) * c_0
    e_0 = zowrap.rows(theta[0], ids)       e_0 = rows(w, ids) + (rows(left, ids) rightᵀ) * c_0
    s_0 = zowrap.ops.head(x_0, theta[0], …)    s_0 = zowrap.ops.head(x_0, w, (x_0 right) * c_0, left, …)
    theta[0] of a vector                   w + left * c_0

Here c_0 is the first point's coefficient. The forward pass costs two more thin products per matrix than the plain one.
Any other use keeps ``perturb_lowrank``, which forms a weight-sized tensor; the pass's note counts these uses.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from zowrap.compiler.program import Program
from zowrap.numerics.dtypes import at_least_float32
from zowrap.passes.graph import product_with
from zowrap.passes.manager import Pass

aten = torch.ops.aten
# Up to this rank the outer product is unrolled, so that it fuses into the operations that follow.
UNROLLED_RANK = 4


class PerturbLowRank(Pass):
    """Replace uses of weights perturbed along low-rank directions; see the module docstring."""

    name = "perturb_lowrank"

    def call(self, program: Program) -> str:
        counts = {"matrix products": 0, "embeddings": 0, "heads": 0, "vectors": 0, "whole tensors": 0}
        for theta in program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb_lowrank.default):
            for value in [u for u in theta.users if u.target is operator.getitem]:
                for use in list(value.users):
                    kind = _rewrite(program.graph, theta, value, use)
                    if kind is not None:
                        counts[kind] += value.args[1] == 0
                if value.users and theta.args[2] is None:
                    _vector(program.graph, theta, value)
                    counts["vectors"] += value.args[1] == 0
                elif value.users:
                    counts["whole tensors"] += value.args[1] == 0
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


class _Writer:
    """Inserts nodes before the node ``before``, in order, each with the layer and the point of that node."""

    def __init__(self, graph: fx.Graph, before: fx.Node) -> None:
        self.graph, self.before = graph, before

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        for name in ("copy_of", "nn_module_stack"):
            if name in self.before.meta:
                node.meta[name] = self.before.meta[name]
        return node

    def to(self, node: Any, dtype: torch.dtype, wanted: torch.dtype) -> Any:
        """Convert ``node`` from ``dtype`` to the wanted dtype, if they differ."""
        return node if dtype == wanted else self(aten.to.dtype, node, wanted)


def _rewrite(graph: fx.Graph, theta: fx.Node, value: fx.Node, use: fx.Node) -> str | None:
    """Replace one use of one point's perturbed weight.

    Returns:
        The kind of use, or None if it has no form with thin products and stays.
    """
    weight, left, right, coefficients = cast("tuple[Any, ...]", theta.args)
    if right is None or weight.meta["val"].ndim != 2:
        return None
    product = product_with(use, value)
    looked_up = use.target is torch.ops.zowrap.rows.default and use.args[0] is value
    is_head = use.target is torch.ops.zowrap.head.default and use.args[1] is value
    if product is None and not looked_up and not is_head:
        return None
    write = _Writer(graph, use)
    coefficient = write(aten.select.int, coefficients, 0, value.args[1])
    rank = left.args[1][1]  # left is a view of the factors, [rows, rank]
    dtype = weight.meta["val"].dtype
    wide = at_least_float32(weight.meta["val"]).dtype
    left, right = write.to(left, torch.float32, wide), write.to(right, torch.float32, wide)
    if is_head:
        x, _, bias, _, _, labels = use.args
        thin = write(aten.mul.Tensor, write(aten.matmul.default, write.to(x, dtype, wide), right), coefficient)
        use.args = (x, weight, bias, thin, left, labels)
        return "heads"
    if product is None:
        ids = use.args[1]
        plain = write(torch.ops.zowrap.rows.default, weight, ids)
        thin, other = write(torch.ops.zowrap.rows.default, left, ids), right
    else:
        plain = write(use.target, *[weight if a is value else a for a in use.args])
        first, other = (left, right) if product.transposed else (right, left)
        thin = write(aten.matmul.default, write.to(product.x, dtype, wide), first)
    change = write(aten.mul.Tensor, _outer(write, thin, other, rank), coefficient)
    result = write.to(write(aten.add.Tensor, write.to(plain, dtype, wide), change), wide, dtype)
    result.meta.update(use.meta)
    use.replace_all_uses_with(result)
    graph.erase_node(use)
    return "embeddings" if product is None else "matrix products"


def _outer(write: _Writer, thin: fx.Node, other: Any, rank: int) -> fx.Node:
    """Write ``thin [..., rank] · other [n, rank]ᵀ``."""
    if rank > UNROLLED_RANK:
        return write(aten.matmul.default, thin, write(aten.t.default, other))
    total: fx.Node | None = None
    for k in range(rank):
        column = write(aten.slice.Tensor, thin, -1, k, k + 1)
        term = write(aten.mul.Tensor, column, write(aten.select.int, other, 1, k))
        total = term if total is None else write(aten.add.Tensor, total, term)
    assert total is not None
    return total


def _vector(graph: fx.Graph, theta: fx.Node, value: fx.Node) -> None:
    weight, left, _, coefficients = cast("tuple[Any, ...]", theta.args)
    write = _Writer(graph, value)
    shape = list(weight.meta["val"].shape)
    dtype = weight.meta["val"].dtype
    coefficient = write(aten.select.int, coefficients, 0, value.args[1])
    wide = at_least_float32(weight.meta["val"]).dtype
    change = write(aten.mul.Tensor, write(aten.view.default, left, shape), coefficient)
    result = write.to(write(aten.add.Tensor, write.to(weight, dtype, wide), change), wide, dtype)
    result.meta.update(value.meta)
    value.replace_all_uses_with(result)
    graph.erase_node(value)
