"""Small memory that is used again and again, and how a matrix is cut so that its rows pass through it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Rows of a matrix per chunk, at least. Measured on products of 512 tokens with the matrices of OPT-125M: fewer rows
# make the product itself slower, more push the scratch out of a core's outer cache.
CHUNK_ROWS = 1024
# Rows of a chunk are a multiple of this, but for the last: 16 float32 outputs are a cache line. Products whose rows
# start anywhere took up to 1.4 times as long (2048 tokens, 768 inputs, 2011 outputs against 2016).
ROW_MULTIPLE = 16
# A chunk of narrow rows is no smaller than this, so that a call's fixed cost stays small beside its work; a chunk of
# wide rows no larger, so that a buffer stays at 16 MB of float32 whatever the model: there is one for each point and
# each purpose. Only a single row of more elements than that makes it larger, for rows are not cut.
LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 18, 1 << 22

_Kept = dict[tuple[str, torch.dtype, torch.device, int], list[Tensor]]


class _Own(threading.local):
    """Each thread has its own: what one is about to multiply with, another must not write over."""

    def __init__(self) -> None:
        self.kept: _Kept = {}


_own = _Own()


def chunks(rows: int, columns: int, tokens: int = 0) -> Iterator[tuple[int, int]]:
    """``(first, last)`` of runs of :func:`longest` rows; the last run may be shorter."""
    length = longest(rows, columns, tokens)
    for first in range(0, rows, max(length, 1)):
        yield first, min(first + length, rows)


def longest(rows: int, columns: int, tokens: int = 0) -> int:
    """Rows of the longest chunk of a ``[rows, columns]`` matrix.

    Args:
        tokens: of a vocabulary head, whose logits for a chunk pass through a scratch of their own; else 0.
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
    """``count`` flat tensors of at least ``size`` elements, zeros when made, the same at every call of that purpose
    in one thread."""
    key = (purpose, dtype, device, count)
    kept = _own.kept
    if key not in kept or kept[key][0].numel() < size:
        kept[key] = [torch.zeros(size, dtype=dtype, device=device) for _ in range(count)]
    return kept[key]


def copied_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the copies that an operator makes of inputs with gaps."""
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_contiguous())


def all_buffers() -> list[Tensor]:
    """Every buffer of this thread: whoever refers to them by address keeps them alive with this."""
    return [tensor for tensors in _own.kept.values() for tensor in tensors]
