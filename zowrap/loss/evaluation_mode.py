"""Evaluation mode for a while: a zeroth-order step compares two losses, so nothing may change between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError

RESTORED = 1 << 16  # running statistics and counters are smaller


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` inside; every submodule's own training flag and what the forward wrote to buffers are restored.

    Parameters, and buffers of more than ``RESTORED`` elements (weights or tables), are too large to keep copies of.

    Raises:
        ZOError: on leaving, if one of those was written to, see :func:`unwritten`.
    """
    training = [child for child in module.modules() if child.training]
    buffers = [b for b in module.buffers() if b.numel() <= RESTORED]
    large = [*module.named_parameters(), *((name, b) for name, b in module.named_buffers() if b.numel() > RESTORED)]
    before = [(b, b._version, b.clone()) for b in buffers]
    for child in training:
        child.training = False
    try:
        with unwritten(large):
            yield
    finally:
        for child in training:
            child.training = True
        for buffer, version, value in before:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def unwritten(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Nothing inside may write to any of the (name in the loss module, tensor).

    Raises:
        ZOError: on leaving, names the first that was written to. A write through ``.data`` goes unnoticed.
    """
    # Inference tensors count no versions.
    before = [(name, tensor, tensor._version) for name, tensor in tensors if not tensor.is_inference()]
    yield
    for name, tensor, version in before:
        if tensor._version != version:
            raise ZOError(
                f"the model's forward writes to {name.removeprefix('model.')} (of shape {tuple(tensor.shape)}) in "
                f"evaluation mode, where a model must stay as it is: let it write in training mode only, or not at "
                f"all (an embedding with max_norm writes to its weight)"
            )
