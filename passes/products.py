"""Which operators multiply by a weight matrix: what both kinds of perturbation have a cheaper form for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten


class Product(NamedTuple):
    """``x · weightᵀ + bias``; ``x · weight + bias`` where ``transposed``, the weight standing as [inputs, outputs]."""

    x: Any
    bias: Any
    transposed: bool


def product_with(use: fx.Node, weight: fx.Node) -> Product | None:
    """``use`` as a product of something else with the matrix ``weight``, or None."""
    args = use.args
    if use.target is aten.linear.default and args[1] is weight and args[0] is not weight:
        return Product(args[0], args[2] if len(args) > 2 else None, transposed=False)
    if use.target is aten.addmm.default and args[2] is weight and args[1] is not weight and not use.kwargs:
        return Product(args[1], args[0], transposed=True)
    if use.target in (aten.mm.default, aten.matmul.default) and args[1] is weight and args[0] is not weight:
        return Product(args[0], None, transposed=True)
    return None
