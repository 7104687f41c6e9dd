"""The check that no weight became NaN or infinite during a run."""

from __future__ import annotations

from collections.abc import Sequence

from zowrap.step.finite import find_not_finite
from zowrap.step.parameters import Parameter


class WeightCheck:
    """Compares the tunable weights with those that a run began with, some of which may have been NaN or infinite.

    Args:
        parameters: what moves, as the base model has it: before a checkpoint is loaded, which may be broken itself.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._before = _count(parameters)

    def find_broken(self, parameters: Sequence[Parameter]) -> str | None:
        """Return the name of the first parameter with more NaNs and infinities than at the beginning, if there is one.

        Args:
            parameters: the same ones, as they are now.
        """
        counts = _count(parameters)
        return next((name for name, count in counts.items() if count > self._before.get(name, 0)), None)


def _count(parameters: Sequence[Parameter]) -> dict[str, int]:
    return find_not_finite((parameter.name, parameter.tensor) for parameter in parameters)
