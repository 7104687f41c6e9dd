"""Generate random numbers as a pure function of a key and an element's index (counter-based noise).

Every random number in zowrap is ``law(hash(key, element))``. The 64-bit *key* is derived from (run seed, step,
direction, parameter id); the 64-bit *element* is the row-major index in the full tensor. Nothing is stored and
nothing is drawn in order, so the perturbation, the update and a replay regenerate the same noise for the whole
tensor, for a slice of it, or for a few rows, on any device.

All arithmetic on bits is 32-bit integer arithmetic that wraps (two's complement), written in plain torch
operations. This file is both the reference and the source that the compiled kernels are traced from, so the two
give identical bits. The floats are built from exact operations only (a table of dyadic rationals and a sign), so
they are identical too; no log or cos is involved.
"""

from __future__ import annotations

import functools
import hashlib
import statistics

import torch
from torch import Tensor

# Multipliers of the "lowbias32" family (C. Wellons, hash-prospector) and the 32-bit golden ratio: each round is
# xor-shift then multiply, and the two halves of the key enter at different rounds so that streams whose keys agree
# in one half still differ.
_M1, _M2, _M3 = 0x7FEB352D, 0x846CA68B, 0x9E3779B1
_GOLDEN64 = 0x9E3779B97F4A7C15

# Domain tags separate the noise of different purposes under one seed.
TAG_DIRECTION = 0x5A4F0001  # the raw noise u of a direction
TAG_ROUNDING = 0x5A4F0002  # stochastic rounding of 16-bit weights
TAG_BLOCKS = 0x5A4F0003  # random block orders
TAG_RIGHT = 0x5A4F0004  # the right factor of a low-rank direction
TAG_SKETCH = 0x5A4F0005  # the signs that the size of a residual credit is estimated with

_TABLE_BITS = 12  # 4096 float32 entries: 16 KiB, stays in the first-level cache
GAUSSIAN_QUANTUM = 2.0**-14  # every gaussian value is a multiple of this: exact in float32 and in int64 sums


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift_right(x: Tensor, k: int) -> Tensor:
    """Logical right shift of int32 (torch's ``>>`` is arithmetic)."""
    return (x >> k) & ((1 << (32 - k)) - 1)


def hash_bits(element_low: Tensor, element_high: Tensor | int, key: Tensor) -> Tensor:
    """32 random bits per element.

    Args:
        element_low: int32, any shape: the low 32 bits of the 64-bit element index.
        element_high: int32 tensor broadcastable to it (or a Python int): the high 32 bits.
        key: int32 ``[2]``: low and high half of the 64-bit key.

    Returns:
        int32 of ``element_low``'s shape.
    """
    x = element_low ^ key[0]
    x = x * _signed(_M1, 32)
    x = x ^ _shift_right(x, 15)
    x = x ^ (key[1] + element_high * _signed(_M3, 32))
    x = x * _signed(_M2, 32)
    x = x ^ _shift_right(x, 16)
    x = x * _signed(_M3, 32)
    return x ^ _shift_right(x, 15)


def split_index(index: Tensor) -> tuple[Tensor, Tensor]:
    """Split int64 element indices into (low, high) int32 halves."""
    low = (index & 0xFFFFFFFF).to(torch.int64)
    low = torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)
    return low, (index >> 32).to(torch.int32)


# --- keys -----------------------------------------------------------------------------------------------------


def _mix64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 tensors (wrapping), as in Steele, Lea & Flood (2014)."""
    x = x ^ ((x >> 30) & ((1 << 34) - 1))
    x = x * _signed(0xBF58476D1CE4E5B9, 64)
    x = x ^ ((x >> 27) & ((1 << 37) - 1))
    x = x * _signed(0x94D049BB133111EB, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def parameter_id(name: str) -> int:
    """Signed 64-bit id of a parameter: a hash of its state-dict name alone, so it does not depend on the others."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def derive_keys(seed: int | Tensor, step: int | Tensor, direction: int | Tensor, ids: Tensor, tag: int) -> Tensor:
    """Derive the keys of one direction at one step, one per parameter.

    Every field passes through a full 64-bit mix before the next enters, so keys such as (2, 7) and (3, 1) cannot
    collide the way sums and products of seeds do.

    Args:
        seed, step, direction: Python ints or 0-d int64 tensors.
        ids: int64 ``[P]`` parameter ids.
        tag: one of the ``TAG_*`` domains.

    Returns:
        int32 ``[P, 2]``: low and high halves.
    """
    state = torch.zeros((), dtype=torch.int64, device=ids.device) + _signed(_GOLDEN64 ^ tag, 64)
    for field in (seed, step, direction):
        if isinstance(field, int):
            field = _signed(field, 64)
        state = _mix64((state ^ field) + _signed(_GOLDEN64, 64))
    key = _mix64(state ^ ids)
    low, high = split_index(key)
    return torch.stack((low, high), dim=-1)


# --- laws -----------------------------------------------------------------------------------------------------


@functools.cache
def _gaussian_table_values() -> tuple[float, ...]:
    """Quantiles of the half-normal at 4096 midpoints, scaled to unit variance, rounded to ``GAUSSIAN_QUANTUM``."""
    size = 1 << _TABLE_BITS
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * size)) for i in range(size)]
    scale = (sum(q * q for q in quantiles) / size) ** -0.5
    return tuple(round(q * scale / GAUSSIAN_QUANTUM) * GAUSSIAN_QUANTUM for q in quantiles)


_tables: dict[torch.device, Tensor] = {}


def gaussian_table(device: torch.device | str = "cpu") -> Tensor:
    """float32 ``[4096]``: the half-normal quantile table, one copy per device."""
    device = torch.device(device)
    if device not in _tables:
        _tables[device] = torch.tensor(_gaussian_table_values(), dtype=torch.float32, device=device)
    return _tables[device]


def gaussian(bits: Tensor, table: Tensor) -> Tensor:
    """Standard normal from 13 of the 32 bits: a half-normal quantile and a sign.

    8192 equally likely values, symmetric, unit variance, reaching ±3.8; the distance of its distribution function
    from the normal's is 6e-5, below what a Kolmogorov–Smirnov test sees at 10⁷ draws (5e-4).

    Args:
        bits: int32, any shape.
        table: :func:`gaussian_table` on the same device.

    Returns:
        float32 of the same shape; every value a multiple of ``GAUSSIAN_QUANTUM``.
    """
    magnitude = torch.ops.aten._unsafe_index.Tensor(table, [_shift_right(bits, 32 - _TABLE_BITS)])
    return magnitude * ((bits << 31 >> 31) | 1).to(torch.float32)


def rademacher(bits: Tensor, table: Tensor) -> Tensor:
    """±1 with equal probability, from the sign bit. float32 of ``bits``' shape."""
    return ((bits >> 31) | 1).to(torch.float32)


LAWS = {"gaussian": gaussian, "rademacher": rademacher}


def uniform16(bits: Tensor) -> Tensor:
    """The top 16 bits as int32 in [0, 65536): the random part of stochastic rounding."""
    return _shift_right(bits, 16)


def draw(law: str, key: Tensor, shape: torch.Size | tuple[int, ...], *, start: int = 0) -> Tensor:
    """Draw float32 noise of ``shape`` for the elements from ``start`` on under ``key`` (int32 ``[2]``): the oracle."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(start, start + count, dtype=torch.int64, device=key.device)
    low, high = split_index(index)
    return LAWS[law](hash_bits(low, high, key), gaussian_table(key.device)).reshape(shape)
