"""What the points of a step have in common when one operator takes the place of their separate ones."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def once(values: Sequence[Any]) -> list[Any]:
    """One value for each point, or a single one where all points share it."""
    return [values[0]] if all(v is values[0] for v in values) else list(values)


def replace(graph: fx.Graph, uses: Sequence[fx.Node], fused: fx.Node, biases: Sequence[Any] | None = None) -> None:
    """Put the outputs of ``fused``, one for each point and with its bias added, in the place of ``uses``."""
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
