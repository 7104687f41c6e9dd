"""Name the floating-point dtypes of weights, and tell the 16-bit ones apart."""

from __future__ import annotations

import torch
from torch import Tensor

from zowrap.names import DTYPES as NAMES

DTYPES = {name: getattr(torch, name) for name in NAMES}

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def is_16_bit(w: Tensor) -> bool:
    """Whether ``w`` is stored in bfloat16 or float16."""
    return w.dtype in SIXTEEN_BIT


def at_least_float32(w: Tensor) -> Tensor:
    """``w`` in the dtype that arithmetic on it uses: float64 stays float64, anything narrower becomes float32."""
    return w if w.dtype == torch.float64 else w.float()
