"""Capture the attention mask that a model makes where the batch has none.

Some models of transformers leave it out while they are compiled, and read it all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PLACES = [f"transformers.models.{name}.modeling_{name}" for name in ("switch_transformers", "longt5", "udop")]
_ASKED = "is_torchdynamo_compiling"


@contextmanager
def capture_masks() -> Iterator[None]:
    """Tell these models while inside that they are not compiled."""
    places = [vars(sys.modules[name]) for name in _PLACES if name in sys.modules]
    plain = [(place, place[_ASKED]) for place in places if _ASKED in place]
    try:
        for place, _ in plain:
            place[_ASKED] = lambda: False
        yield
    finally:
        for place, function in plain:
            place[_ASKED] = function
