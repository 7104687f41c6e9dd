"""Capture ``len(tensor)`` as a size that stays open: Python makes a number of what ``len`` returns, and fixes it."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_lengths(model: nn.Module) -> Iterator[None]:
    """Make the modules of transformers that a model is made of call :func:`_length` for ``len`` while inside."""
    names = {type(module).__module__ for module in model.modules()}
    places = [vars(sys.modules[n]) for n in names if n.startswith("transformers.models.") and n in sys.modules]
    places = [place for place in places if "len" not in place]
    try:
        for place in places:
            place["len"] = _length
        yield
    finally:
        for place in places:
            del place["len"]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else builtins.len(value)
