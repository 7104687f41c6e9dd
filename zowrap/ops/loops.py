"""Elementwise functions over a parameter, compiled once for all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, compile_function

# Most elements handled by one call. It divides 2³², so the high half of the element index is constant within a call,
# and it fits an int32 counter.
SEGMENT = 1 << 30
_EXAMPLE = 4096  # elements of the example tensors for tracing; only a size hint


class Loops:
    """Compiled functions by name. Each is compiled when it first runs."""

    def __init__(self) -> None:
        self._compiled: dict[tuple, Compiled] = {}

    def run(
        self, name: tuple, function: Callable[..., Any], arrays: Sequence[Tensor], small: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Call the function, compiled for any length of ``arrays``; ``small`` inputs have fixed shapes."""
        key = (*name, arrays[0].device)
        if key not in self._compiled:
            rows = arrays[0].ndim == 2
            sizes = {1: (64,) if rows else (_EXAMPLE,), 2: (64, 96)}  # equal sizes here become one symbol
            examples = [a.new_zeros(sizes[a.ndim]) for a in arrays]
            self._compiled[key] = compile_loop(function, [*examples, *small], range(len(arrays)))
        with torch.no_grad():
            return self._compiled[key](*arrays, *small)


def compile_loop(function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> Compiled:
    """Compile an elementwise function, to C++ for a CPU or to Triton for a GPU."""
    if examples[0].is_cuda:
        from zowrap.ops.triton import loops

        return loops.compile_loop(function, examples, dynamic)
    return compile_function(function, examples, dynamic)


def alike(count: int) -> int:
    """Return the smallest number of elements for which a GPU runs the same machine code as for ``count``.

    Triton compiles separate code for multiples of 16, reading four or eight elements at a time, and for 1.
    """
    return 16 if count % 16 == 0 else min(count, 2)


def segments(start: int, count: int) -> Iterator[tuple[int, slice]]:
    """Cut ``count`` elements of a parameter, from number ``start`` on, into segments at multiples of ``SEGMENT``.

    Yields:
        The number of the segment's first element, and the segment's slice of the ``count`` elements.
    """
    first, end = start, start + count
    while first < end:
        last = min(end, (first // SEGMENT + 1) * SEGMENT)
        yield first, slice(first - start, last - start)
        first = last


def flat_index(like: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and high int32 halves of the element numbers of a segment that begins at :func:`offset`."""
    return torch.arange(like.shape[0], dtype=torch.int32, device=like.device) + offset[0], offset[1]


def split(values: Sequence[Tensor], *counts: int) -> list[Sequence[Tensor]]:
    """Split ``values`` into consecutive parts of these lengths, which must add up to all of them."""
    runs, first = [], 0
    for count in counts:
        runs.append(values[first : first + count])
        first += count
    assert first == len(values)
    return runs


_offsets: dict[tuple[int, torch.device], Tensor] = {}


def offset(first: int, device: torch.device) -> Tensor:
    """Return the low and high half of an element index as int32 ``[2]``.

    Results are cached for each device, because the same chunk starts recur at every step.
    """
    key = (first, device)
    if key not in _offsets:
        low, high = first & 0xFFFFFFFF, first >> 32
        _offsets[key] = torch.tensor([low - (1 << 32) if low >> 31 else low, high], dtype=torch.int32, device=device)
    return _offsets[key]
