"""Evaluation mode for a while: a zeroth-order step compares two losses, so nothing may change between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

RESTORED = 1 << 16  # running statistics and counters are smaller


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` inside; every submodule's own training flag and what the forward wrote to buffers are restored.

    Buffers of more than ``RESTORED`` elements are taken to be weights or tables, which a forward does not write to.
    """
    training = [child for child in module.modules() if child.training]
    buffers = [b for b in module.buffers() if b.numel() <= RESTORED]
    before = [(b, b._version, b.clone()) for b in buffers]
    for child in training:
        child.training = False
    try:
        yield
    finally:
        for child in training:
            child.training = True
        for buffer, version, value in before:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
