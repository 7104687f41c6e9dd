"""Integer codes that move: how a weight is read from them, and how a change of it is written.

    w = codes · scale / 127                     scale float32 [rows], the largest magnitude of each row when quantised
    codes ← clamp(codes + SR(Δw · 127 / scale)) SR(x) = ⌊x⌋ + 1 with probability x − ⌊x⌋, else ⌊x⌋

SR is unbiased: the mean of what is written is Δw, however small, as long as no code leaves ±127. QuZO (2502.12346).
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def unit_of(scale: Tensor) -> Tensor:
    """float32 ``[rows]``: what one step of a code is worth."""
    return scale.float() / LARGEST


def values(codes: Tensor, unit: Tensor) -> Tensor:
    """float32 ``[rows, columns]``: the weights that int8 ``codes`` stand for."""
    return codes.float() * unit.unsqueeze(1)


def written(codes: Tensor, change: Tensor, unit: Tensor, bits: Tensor, apply: Tensor) -> Tensor:
    """The codes after a change of the weights, rounded stochastically.

    Args:
        codes: int8 ``[rows, columns]``.
        change: float32, of the weights.
        unit: see :func:`unit_of`. A row of scale 0 has only zeros and keeps them.
        bits: int32 random bits.
        apply: 0-d bool; False returns ``codes``.
    """
    steps = torch.where(unit > 0, change.t() / unit, 0.0).t()
    whole = torch.floor(steps)
    # 24 bits: any fraction that float32 holds beside a whole number, compared exactly.
    draw = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    moved = whole + (draw < steps - whole).to(torch.float32)
    new = (codes.float() + moved).clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.where(apply, new, codes)
