"""Read weights from int8 codes, and train the codes themselves.

    w = codes · scale / 127                     scale float32 [rows], the largest magnitude of each row when quantised
    codes ← clamp(codes + SR(Δw · 127 / scale)) SR(x) = ⌊x⌋ + 1 with probability x − ⌊x⌋, else ⌊x⌋

SR (stochastic rounding) is unbiased: the expected change is Δw, however small, as long as no code leaves ±127.
Source: QuZO (2502.12346).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def unit_of(scale: Tensor) -> Tensor:
    """The change of a weight when its code changes by one: float32 ``[rows]``."""
    return scale.float() / LARGEST


def dequantize(codes: Tensor, unit: Tensor) -> Tensor:
    """The weights that int8 ``codes`` represent: float32 ``[rows, columns]``."""
    return codes.float() * unit.unsqueeze(1)


def add_change(codes: Tensor, change: Tensor, unit: Tensor, bits: Tensor, apply: Tensor) -> Tensor:
    """Add a change of the weights to their codes, rounded stochastically.

    Args:
        codes: int8 ``[rows, columns]``.
        change: float32 ``[rows, columns]``, the change of the weights.
        unit: float32 ``[rows]``, see :func:`unit_of`. A row with scale 0 holds only zeros and keeps them.
        bits: int32 ``[rows, columns]`` random bits.
        apply: 0-d bool; False returns ``codes`` unchanged.

    Returns:
        int8 ``[rows, columns]``.
    """
    steps = torch.where(unit > 0, change.t() / unit, 0.0).t()
    whole = torch.floor(steps)
    # 24 bits are as many as a float32 significand has, so the comparison with the fraction is exact.
    draw = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    moved = whole + (draw < steps - whole).to(torch.float32)
    new = (codes.float() + moved).clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.where(apply, new, codes)
