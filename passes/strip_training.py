"""Remove inactive dropout, run-time assertions, aliases and full slices.

before                                              after
d = dropout(x, 0.1, False)                          y = linear(x, w)
_assert_tensor_metadata(d, None, None, int64)
y = linear(alias(d), w)
"""

from __future__ import annotations

import sys

import torch
from torch import fx

from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.passes.manager import Pass

aten = torch.ops.aten
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


class StripTraining(Pass):
    """Remove nodes that matter only in training; see the module docstring."""

    name = "strip_training"

    def call(self, program: Program) -> str:
        checks = aliases = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _CHECKS or node.target is torch._check:
                program.graph.erase_node(node)
                checks += 1
            elif node.target in _ALIASES or _keeps_everything(node):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                aliases += 1
        return f"removed {checks} assertions and {aliases} aliases or inactive dropouts"

    def ensures(self, program: Program) -> None:
        """Check that nothing random is left: the evaluations of a step must differ only in the weights."""
        for node in program.graph.nodes:
            if isinstance(node, fx.Node) and _draws(node):
                raise ZOCaptureError(f"the model draws random numbers in evaluation mode ({node.target})")
            if node.op == "call_function" and node.target in _CHECKS:
                raise ZOInternalError(f"{node.name} is an assertion")


def _keeps_everything(node: fx.Node) -> bool:
    """Return whether the node is an inactive dropout or a slice from start to end."""
    if node.target in _DROPOUT:
        return not node.args[2]
    return node.target is aten.slice.Tensor and node.args[2:] in ((0, sys.maxsize), (0, sys.maxsize, 1))


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _fused_attention(node)


def _fused_attention(node: fx.Node) -> bool:
    """Return whether the node is attention without dropout: its tag says random, but probability 0 draws nothing."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return not probability
