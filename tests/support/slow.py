"""Spread the values of a parametrized test between the default suite and the slow target."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(default: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values as parameters, of which those in ``default`` run by default and the others in the slow target."""
    return [pytest.param(value, marks=() if value in default else pytest.mark.slow) for value in values]
