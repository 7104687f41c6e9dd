"""Round float32 results to 16-bit weights, stochastically or to nearest.

A zeroth-order update of one element is usually far below half a unit in the last place of a 16-bit weight:
round-to-nearest would drop it (99 % of the updates at |Δw| = 1e-6 in bfloat16). Rounding up with probability equal to
the discarded fraction keeps the expected weight exact, so small steps add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zowrap.numerics.noise import uniform16


def round_stochastically(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``value`` to ``dtype``, up or down with the exact probabilities (in steps of 2⁻¹⁶ or finer).

    Args:
        value: float32.
        bits: int32 random bits, same shape.
        dtype: bfloat16 or float16; float32 and float64 are plain conversions.

    Raises:
        TypeError: any other dtype.
    """
    if dtype in (torch.float32, torch.float64):
        return value.to(dtype)
    if dtype == torch.bfloat16:
        return _truncate_mantissa(value, uniform16(bits), 16).to(dtype)
    if dtype == torch.float16:
        # Normal range: 13 mantissa bits are dropped. Below 2⁻¹⁴ float16 is a fixed-point grid of 2⁻²⁴.
        normal = _truncate_mantissa(value, uniform16(bits) >> 3, 13)
        grid = torch.floor(value * 2.0**24 + uniform16(bits).to(torch.float32) * 2.0**-16) * 2.0**-24
        return torch.where(value.abs() < 2.0**-14, grid, normal).clamp(-65504.0, 65504.0).to(dtype)
    raise TypeError(f"weights of {dtype} cannot be updated by stochastic rounding")


def round_to_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``value`` to the nearest number of ``dtype``, ties to even; the result stays float32.

    It equals ``value.to(dtype).float()``, which a compiler may drop as a round trip; these integer steps it may not.

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
    """
    if dtype == torch.float32:
        return value
    if dtype == torch.bfloat16:
        return _round_mantissa(value, 16)
    if dtype == torch.float16:
        normal = _round_mantissa(value, 13)
        normal = torch.where(normal.abs() > 65504.0, value * math.inf, normal)
        grid = torch.round(value * 2.0**24) * 2.0**-24  # below 2⁻¹⁴ float16 is a fixed-point grid
        return torch.where(value.abs() < 2.0**-14, grid, normal)
    raise TypeError(f"{dtype} is not a dtype of weights that are rounded")


def _round_mantissa(value: Tensor, dropped: int) -> Tensor:
    """Round half to even: add half a unit of the last kept bit (less one where that bit is 0), then truncate."""
    raw = value.view(torch.int32)
    odd = (raw >> dropped) & 1
    rounded = (raw + ((1 << (dropped - 1)) - 1) + odd) & ~((1 << dropped) - 1)
    return torch.where(value.isfinite(), rounded, raw).view(torch.float32)


def _truncate_mantissa(value: Tensor, random: Tensor, dropped: int) -> Tensor:
    """Add ``dropped`` random bits below the kept mantissa, then truncate: exact, since magnitude bits are ordered."""
    raw = value.view(torch.int32)
    rounded = (raw + random) & ~((1 << dropped) - 1)
    return torch.where(value.isfinite(), rounded, raw).view(torch.float32)
