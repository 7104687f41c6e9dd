"""Fuse a vocabulary head and its cross-entropy into one operator that never holds the logits.

    before                                          after
    logits = linear(x, w)                           s = zowrap.ops.head(slice(x, 1, 0, -1), w, None, …, labels)
    shifted = slice(logits, 1, 0, -1)
    s = zowrap.token_losses(shifted, labels)

The head is not fused if another operation (a soft cap, a scale) comes between the product and the loss, if something
else reads the logits, or if there are few classes. Then the loss is written out as plain operations, which the
compiler fuses as it sees fit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.inductor import size_oblivious
from zowrap.compiler.program import Program
from zowrap.errors import ZOInternalError
from zowrap.loss.module import sum_token_losses
from zowrap.passes.graph import product_with
from zowrap.passes.manager import Pass

aten = torch.ops.aten
LEAST_CLASSES = 128  # with fewer, the logits are no larger than other activations
_CONVERSIONS = {aten.to.dtype, aten._to_copy.default}
_MARK = torch.ops.zowrap.token_losses.default


class FuseHead(Pass):
    """Fuse heads with their losses; see the module docstring."""

    name = "fuse_head"

    def call(self, program: Program) -> str:
        fused = written = 0
        for loss in program.graph.find_nodes(op="call_function", target=_MARK):
            if _fuse(program, loss):
                fused += 1
            else:
                _write_out(program, loss)
                written += 1
        return f"{fused} heads fused with their loss, {written} losses of logits"

    def ensures(self, program: Program) -> None:
        if program.graph.find_nodes(op="call_function", target=_MARK):
            raise ZOInternalError("a mark for the loss of logits is left")


def _fuse(program: Program, loss: fx.Node) -> bool:
    graph = program.graph
    slices: list[tuple[Any, ...]] = []
    node, labels = cast("tuple[fx.Node, fx.Node]", loss.args)
    while len(node.users) == 1:
        if node.target is aten.slice.Tensor and node.args[1] in (0, 1):
            slices.append(node.args[1:])
        elif not (node.target in _CONVERSIONS and node.meta["val"].dtype == torch.float32):
            break
        node = cast("fx.Node", node.args[0])
    weight = node.args[1] if node.target is aten.linear.default else None
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or len(node.users) != 1:
        return False
    product = product_with(node, weight)
    value = weight.meta["val"]
    if product is None or value.ndim != 2 or not isinstance(value.shape[0], int) or value.shape[0] < LEAST_CLASSES:
        return False
    if product.x.meta["val"].ndim != 3 or value.dtype == torch.float64:
        return False
    with graph.inserting_before(loss):
        x = product.x
        for args in reversed(slices):
            x = graph.call_function(aten.slice.Tensor, (x, *args))
        fused = graph.call_function(
            torch.ops.zowrap.head.default, (x, weight, product.bias, None, None, labels), name="head"
        )
    fused.meta["val"] = loss.meta["val"]
    loss.replace_all_uses_with(fused)
    graph.erase_node(loss)
    return True


def _write_out(program: Program, loss: fx.Node) -> None:
    """Replace the mark ``token_losses`` by the operations of :func:`sum_token_losses`."""
    given = cast("tuple[fx.Node, ...]", loss.args)
    with torch.no_grad(), size_oblivious(use_duck_shape=False), program.fake_mode:
        traced = make_fx(sum_token_losses)(*[n.meta["val"] for n in given])
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    with program.graph.inserting_before(loss):
        result = program.graph.graph_copy(traced.graph, copies)
    loss.replace_all_uses_with(cast("fx.Node", result))
    program.graph.erase_node(loss)
