"""Recurrent layers are captured as one operator.

torch unrolls an LSTM to learn its shapes, which fixes the length of every batch, and tags it as drawing random numbers
for the sake of its dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zowrap import operators

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def recurrent_layers() -> Iterator[None]:
    """Within, :class:`torch.nn.RNNBase` calls ``zowrap.recurrent`` where its dropout is inactive."""
    plain = {kind: getattr(torch._VF, kind) for kind in _KINDS}
    try:
        for kind in _KINDS:
            setattr(torch._VF, kind, _instead(kind, plain[kind]))
        yield
    finally:
        for kind in _KINDS:
            setattr(torch._VF, kind, plain[kind])


def _instead(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def layer(*args: Any) -> Any:
        packed = not isinstance(args[3], bool)  # then batch_sizes come second
        if packed or (args[5] and args[6]):
            return plain(*args)
        x, state, weights, biases, layers, _, _, both_ways, batch_first = args
        states = list(state) if kind == "lstm" else [state]
        return tuple(operators.recurrent(kind, x, states, weights, biases, layers, both_ways, batch_first))

    return layer
