"""Which floating-point types there are, and how the 16-bit ones are treated."""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.names import DTYPES as NAMES

DTYPES = {name: getattr(torch, name) for name in NAMES}

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def is_16_bit(w: Tensor) -> bool:
    return w.dtype in SIXTEEN_BIT


def at_least_float32(w: Tensor) -> Tensor:
    """16-bit weights are computed with in float32, float64 weights in float64."""
    return w if w.dtype == torch.float64 else w.float()
