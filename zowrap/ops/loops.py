"""Functions over the elements of a parameter, compiled once for all lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, compile_function

# Largest run of elements handled by one call. It divides 2³², so the high half of the element index is constant within
# a call, and it fits an int32 counter.
SEGMENT = 1 << 30
_EXAMPLE = 4096  # elements of the tensors that kernels are traced with; a size hint, nothing else depends on it


class Loops:
    """Compiled functions by name; each is compiled when it is first run."""

    def __init__(self) -> None:
        self._compiled: dict[tuple, Compiled] = {}

    def run(
        self, name: tuple, function: Callable[..., Any], arrays: Sequence[Tensor], small: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Call the function, compiled for every length of ``arrays``; ``small`` inputs have fixed shapes."""
        key = (*name, arrays[0].device)
        if key not in self._compiled:
            rows = arrays[0].ndim == 2
            sizes = {1: (64,) if rows else (_EXAMPLE,), 2: (64, 96)}  # equal sizes here become one symbol
            examples = [a.new_zeros(sizes[a.ndim]) for a in arrays]
            self._compiled[key] = compile_loop(function, [*examples, *small], range(len(arrays)))
        with torch.no_grad():
            return self._compiled[key](*arrays, *small)


def compile_loop(function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> Compiled:
    """Compile an elementwise function: to C++ for a CPU, to Triton for a GPU."""
    if examples[0].is_cuda:
        from zowrap.ops.triton import loops

        return loops.compile_loop(function, examples, dynamic)
    return compile_function(function, examples, dynamic)


def alike(count: int) -> int:
    """The smallest number of elements that takes the same machine code on a GPU as ``count``.

    Triton has code of its own for multiples of 16, whose elements are read four or eight at a time, and for 1.
    """
    return 16 if count % 16 == 0 else min(count, 2)


def segments(start: int, count: int) -> Iterator[tuple[int, slice]]:
    """Runs that make up ``count`` elements of a parameter from number ``start`` on, cut at multiples of ``SEGMENT``.

    Yields:
        The number of a run's first element, and where the run lies among the ``count``.
    """
    first, end = start, start + count
    while first < end:
        last = min(end, (first // SEGMENT + 1) * SEGMENT)
        yield first, slice(first - start, last - start)
        first = last


def flat_index(like: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """int32 halves, low and high, of the element numbers of a run that begins at ``offset`` (see :func:`offset`)."""
    return torch.arange(like.shape[0], dtype=torch.int32, device=like.device) + offset[0], offset[1]


def split(values: Sequence[Tensor], *counts: int) -> list[Sequence[Tensor]]:
    """``values`` in runs of these lengths, which make up all of them."""
    runs, first = [], 0
    for count in counts:
        runs.append(values[first : first + count])
        first += count
    assert first == len(values)
    return runs


_offsets: dict[tuple[int, torch.device], Tensor] = {}


def offset(first: int, device: torch.device) -> Tensor:
    """int32 ``[2]``: low and high half of an element index, kept per device (chunk starts recur every step)."""
    key = (first, device)
    if key not in _offsets:
        low, high = first & 0xFFFFFFFF, first >> 32
        _offsets[key] = torch.tensor([low - (1 << 32) if low >> 31 else low, high], dtype=torch.int32, device=device)
    return _offsets[key]
