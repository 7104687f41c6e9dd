"""Checks of values that options and hyper-parameters take. Torch is not imported here: a wrong value is told at once.

Each takes the rule that has the hyper-parameter, or ``""`` for an option of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from zowrap.errors import Option, ZOError, nearest

# float32's smallest normal number and its largest: every value is used in float32.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def check_positive(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value is a positive finite number, in float32 too: there it is used."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ZOError(Option(name, rule=rule), f" must be a positive finite number, got {value!r}")
        if not SMALLEST <= value <= LARGEST:
            raise ZOError(
                Option(name, rule=rule), f" must lie in the range of float32, 1.2e-38 to 3.4e38, got {value!r}"
            )


def check_fraction(rule: str, **values: float) -> None:
    """Raise :class:`ZOError` unless every value lies in [0, 1)."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ZOError(Option(name, rule=rule), f" must lie in [0, 1), got {value!r}")


def check_count(rule: str, **values: int) -> None:
    """Raise :class:`ZOError` unless every value is a whole number from 1."""
    for name, value in values.items():
        if not is_whole(value) or value < 1:
            raise ZOError(Option(name, rule=rule), f" must be a whole number from 1, got {value!r}")


def check_flag(rule: str, **values: bool) -> None:
    """Raise :class:`ZOError` unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ZOError(Option(name, rule=rule), f" must be True or False, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether it is an ``int`` and not a ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_name(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`ZOError` unless ``value`` is one of ``choices``; the message names the closest one."""
    choices = list(choices)
    if value not in choices:
        raise ZOError("unknown ", Option(option), f" {value!r}{nearest(str(value), choices)}")
