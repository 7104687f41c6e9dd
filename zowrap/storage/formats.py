"""Name the formats in which a model can be exported, and check a given one."""

from __future__ import annotations

import torch

from zowrap.errors import ZOError, nearest
from zowrap.names import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_format(name: str) -> None:
    """Raise :class:`ZOError` unless ``name`` is one of :data:`zowrap.names.FORMATS`."""
    if name not in FORMATS:
        raise ZOError(f"unknown --format {name!r}{nearest(name, FORMATS)}")
