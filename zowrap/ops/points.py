"""Operator arguments that may differ between the points of a step.

An operator takes such an argument as a list: one tensor for each point, or a single tensor that all points share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def at_point(values: Sequence[T], point: int) -> T:
    """Return the point's own value, or the value that all points share."""
    return values[point % len(values)]


def empty_products(x: Sequence[Tensor], outputs: int, points: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Allocate the results of products with a matrix of ``outputs`` rows: ``[..., outputs]`` for each point.

    Args:
        x: ``[..., inputs]`` for each point, or a single tensor that all points share.
        dtype: dtype of the results, by default that of x.
    """
    inputs = [at_point(x, p) for p in range(points)]
    return [each.new_empty((*each.shape[:-1], outputs), dtype=dtype) for each in inputs]
