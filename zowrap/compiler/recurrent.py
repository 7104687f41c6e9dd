"""Capture recurrent layers as one operator.

Without it, torch unrolls an LSTM to learn its shapes, which fixes the length of every batch, and marks it as random
because of its dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator


@operator("recurrent", traits=Traits(), cost=Cost())
def recurrent(
    kind: str,
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Run one of torch's recurrent layers without dropout, for any batch size and length.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        x: ``[length, rows, inputs]``; ``[rows, length, inputs]`` with ``batch_first``.
        states: the initial states, ``[layers · directions, rows, size]``; two for an LSTM, else one.
        weights: in the order of :class:`torch.nn.RNNBase`.

    Returns:
        The outputs, in the layout of ``x``, and the final states.
    """
    first = states if kind == "lstm" else states[0]
    rest = (has_biases, layers, 0.0, False, bidirectional, batch_first)
    return [result.contiguous() for result in getattr(torch.ops.aten, kind).input(x, first, weights, *rest)]


@recurrent.register_fake
def _(kind, x, states, weights, has_biases, layers, bidirectional, batch_first):
    size = states[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((*x.shape[:-1], size)), *[x.new_empty(state.shape) for state in states]]


_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def capture_recurrent_layers() -> Iterator[None]:
    """Make :class:`torch.nn.RNNBase` call :func:`recurrent` while inside, if its dropout is inactive."""
    plain = {kind: getattr(torch._VF, kind) for kind in _KINDS}
    try:
        for kind in _KINDS:
            setattr(torch._VF, kind, _make_replacement(kind, plain[kind]))
        yield
    finally:
        for kind in _KINDS:
            setattr(torch._VF, kind, plain[kind])


def _make_replacement(kind: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def layer(*args: Any) -> Any:
        packed = not isinstance(args[3], bool)  # then the second argument is batch_sizes
        if packed or (args[5] and args[6]):
            return plain(*args)
        x, state, weights, biases, layers, _, _, both_ways, batch_first = args
        states = list(state) if kind == "lstm" else [state]
        return tuple(recurrent(kind, x, states, weights, biases, layers, both_ways, batch_first))

    return layer
