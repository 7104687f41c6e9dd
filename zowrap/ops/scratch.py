"""Reused scratch buffers, and the cutting of matrices into chunks of rows that fit into them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# The least number of rows in a chunk. Measured on products of 512 tokens with the matrices of OPT-125M: fewer rows slow
# down the product itself, more rows push the scratch buffer out of a core's outer cache.
CHUNK_ROWS = 1024
# Every chunk but the last has a multiple of this many rows: 16 float32 outputs are one cache line. Products with
# unaligned rows took up to 1.4 times as long (2048 tokens, 768 inputs, 2011 outputs against 2016).
ROW_MULTIPLE = 16
# Bounds on the elements of a chunk. The lower one, for narrow rows, keeps the fixed cost of a call small compared with
# its work. The upper one, for wide rows, limits a buffer to 16 MB of float32 for any model; there is a buffer for each
# point and purpose. A single row may exceed it, because rows are not cut.
LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 18, 1 << 22

_Kept = dict[tuple[str, torch.dtype, torch.device, int], list[Tensor]]


class _Own(threading.local):
    """The buffers of one thread. Threads share none, because one could overwrite the operands of another's product."""

    def __init__(self) -> None:
        self.kept: _Kept = {}


_own = _Own()


def chunks(rows: int, columns: int, tokens: int = 0) -> Iterator[tuple[int, int]]:
    """Yield ``(first, last)`` for chunks of :func:`longest` rows; the last chunk may be shorter."""
    length = longest(rows, columns, tokens)
    for first in range(0, rows, max(length, 1)):
        yield first, min(first + length, rows)


def longest(rows: int, columns: int, tokens: int = 0) -> int:
    """Return the number of rows in the longest chunk of a ``[rows, columns]`` matrix.

    Args:
        tokens: for a vocabulary head, the number of tokens, because a chunk's logits need a buffer too; otherwise 0.
    """
    most = max(1, MOST_ELEMENTS // max(columns, tokens, 1))
    least = min(max(CHUNK_ROWS, LEAST_ELEMENTS // max(columns, 1)), most)
    pieces = max(1, rows // least, -(-rows // most))
    length = -(-rows // pieces)
    if pieces == 1:
        return length
    aligned = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
    return aligned if aligned <= most else most // ROW_MULTIPLE * ROW_MULTIPLE or length


def buffers(purpose: str, dtype: torch.dtype, device: torch.device, count: int, size: int) -> list[Tensor]:
    """Return ``count`` flat tensors of at least ``size`` elements, filled with zeros when they are first made.

    In one thread, every call with the same arguments except ``size`` returns the same tensors, replaced by longer ones
    if ``size`` grows.
    """
    key = (purpose, dtype, device, count)
    kept = _own.kept
    if key not in kept or kept[key][0].numel() < size:
        kept[key] = [torch.zeros(size, dtype=dtype, device=device) for _ in range(count)]
    return kept[key]


def copied_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the copies that an operator makes of non-contiguous inputs."""
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_contiguous())


def all_buffers() -> list[Tensor]:
    """Return every buffer of this thread, for callers that refer to buffers by address and must keep them alive."""
    return [tensor for tensors in _own.kept.values() for tensor in tensors]
