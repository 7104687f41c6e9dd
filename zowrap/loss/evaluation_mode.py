"""Keep a model unchanged while it is evaluated: a zeroth-order step compares losses, so nothing may change between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.adapted_parameters import apply_without_writing

MAX_RESTORED = 1 << 16  # elements; running statistics and counters are smaller


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode while inside; restore training flags and small buffers on leaving.

    Parameters, and buffers of more than ``MAX_RESTORED`` elements (weights or tables), are too large to copy, so
    writing to one is an error. A parameter that is given other memory (``weight.data = …``) gets its own back.

    Raises:
        ZOError: on leaving, if one of those was written to, see :func:`forbid_writes`.
    """
    training = [child for child in module.modules() if child.training]
    large = [*module.named_parameters(), *((name, b) for name, b in module.named_buffers() if b.numel() > MAX_RESTORED)]
    plain = (p for p in module.parameters() if type(p) is nn.Parameter and not p.is_meta)
    memory = [(p, p.data, p.data_ptr()) for p in plain]
    for child in training:
        child.training = False
    try:
        with keep_buffers(module), forbid_writes(large), apply_without_writing(module):
            yield
    finally:
        for parameter, data, place in memory:
            if parameter.data_ptr() != place:
                parameter.data = data
        for child in training:
            child.training = True


@contextmanager
def keep_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the buffers of up to ``MAX_RESTORED`` elements on leaving: counters and running statistics."""
    before = [(b, b._version, b.clone()) for b in module.buffers() if b.numel() <= MAX_RESTORED]
    try:
        yield
    finally:
        for buffer, version, value in before:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def forbid_writes(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Check on leaving that nothing wrote to any of the given (name in the loss module, tensor) pairs.

    Raises:
        ZOError: something did; the message names the first such tensor. Writes through ``.data`` go unnoticed.
    """
    # Inference tensors have no version counter.
    before = [(name, tensor, tensor._version) for name, tensor in tensors if not tensor.is_inference()]
    yield
    for name, tensor, version in before:
        if tensor._version != version:
            raise ZOError(
                f"the model's forward writes to {name.removeprefix('model.')} (of shape {tuple(tensor.shape)}) in "
                f"evaluation mode, which must not change a model: let it write in training mode only, or not at "
                f"all (an embedding with max_norm writes to its weight)"
            )
