"""Values that options take, checked in the user's words; the rules' hyper-parameters as well."""

from __future__ import annotations

import math

import torch

from zowrap.errors import ZOError, nearest
from zowrap.names import MEMORY


def check_positive(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value is a positive finite number, in float32 too: there it is used."""
    float32 = torch.finfo(torch.float32)
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ZOError(f"{rule}: {name} must be a positive finite number, got {value!r}")
        if not float32.tiny <= value <= float32.max:
            raise ZOError(f"{rule}: {name} must lie in the range of float32, 1.2e-38 to 3.4e38, got {value!r}")


def check_fraction(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value lies in [0, 1)."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ZOError(f"{rule}: {name} must lie in [0, 1), got {value!r}")


def check_count(rule: str, **values: int) -> None:
    """Raise :class:`ZOError` unless every value is a whole number from 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ZOError(f"{rule}: {name} must be a whole number from 1, got {value!r}")


def check_flag(rule: str, **values: bool) -> None:
    """Raise :class:`ZOError` unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ZOError(f"{rule}: {name} must be True or False, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_memory(value: str) -> str:
    """``value``, if it is one of :data:`MEMORY`.

    Raises:
        ZOError: it is not.
    """
    if value not in MEMORY:
        raise ZOError(f"unknown memory {value!r}{nearest(value, MEMORY)}")
    return value
