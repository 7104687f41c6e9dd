"""Which points of a step are evaluated together: both sides of a direction in one program, or each by itself.

Paired is faster: every weight is read and all noise is drawn once for both sides. Sequential holds the activations of
one side at a time. Losses are the same up to rounding.

``memory="auto"`` leaves the choice to the first batch, whose sizes decide what a step needs: paired where it fits into
the free memory, else sequential. A larger batch may turn paired into sequential; nothing turns it back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zowrap import memory
from zowrap.errors import ZOCaptureError, ZOError, nearest
from zowrap.estimators import Point
from zowrap.loss import Batch
from zowrap.names import MEMORY

if TYPE_CHECKING:
    from zowrap.costs import Estimator
    from zowrap.model import ZOModel

_OPEN = "it is chosen at the next step"


def check_memory(value: str) -> str:
    """``value``, if it is one of :data:`MEMORY`.

    Raises:
        ZOError: it is not.
    """
    if value not in MEMORY:
        raise ZOError(f"unknown memory {value!r}{nearest(value, MEMORY)}")
    return value


class Schedule:
    """The schedule of one model's steps.

    Args:
        asked: one of :data:`MEMORY`.

    Attributes:
        name: ``"paired"`` or ``"sequential"``; ``"auto"`` while nothing is chosen, which evaluates as paired does.
        why: of that name, in words.
        largest: elements of the largest batch evaluated so far; only a larger one asks again.

    Raises:
        ZOError: ``asked`` is none of them.
    """

    def __init__(self, asked: str) -> None:
        self.asked = self.name = check_memory(asked)
        self.why = _OPEN if asked == "auto" else "as asked"
        self.largest = 0

    @property
    def sequential(self) -> bool:
        return self.name == "sequential"

    def settle(self, zm: ZOModel, batch: Batch) -> None:
        """Choose, where that is left open and ``batch`` is larger than any before; called before it is evaluated."""
        size = sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
        if size <= self.largest or zm._engine.name == "eager":  # which evaluates each point by itself anyway
            return
        if zm.planned is not None:
            from zowrap.choice import settle_engine

            planned, zm.planned = zm.planned, None
            if settle_engine(zm, batch, planned):
                return
        if self.asked == "auto" and not self.sequential:
            from zowrap.costs import Estimator, weight_bytes

            try:
                estimator = Estimator(zm, batch)
                estimator.engine.captured(batch)
            except ZOCaptureError:  # the engine says so itself, and runs eagerly
                return
            there = weight_bytes(zm.model) + zm._job.state_bytes  # needed, but no longer free
            self.choose(estimator, memory.free_memory(zm._job.device) + there)
        self.largest = size

    def choose(self, estimator: Estimator, free: int) -> None:
        """Choose for batches of the estimator's sizes, unless a schedule was asked for.

        The exact analysis takes seconds: it is made only where a bound, which takes milliseconds, does not fit.

        Args:
            free: bytes free for the model, its state and a step.
        """
        if self.asked != "auto":
            return
        try:
            bound = estimator.bound()
            paired, sequential = bound, bound
            if not memory.fits(bound, free):
                schedules = estimator.costs().schedules
                paired, sequential = schedules["paired"], schedules["sequential"]
        except ZOCaptureError as error:
            self.name, self.why = "paired", f"it is faster; what it needs is not known: {error}"
            return
        self.name, self.why = memory.choose_memory(paired, sequential, free)

    # --- what a state and a journal keep of it ------------------------------------------------------------------

    def record(self) -> dict[str, str | int]:
        """``{"memory": name, "largest_batch": elements}``."""
        return {"memory": self.name, "largest_batch": self.largest}

    def take(self, name: str, largest: int) -> None:
        """Go on from a :meth:`record`. A schedule that was asked for stays.

        Raises:
            ZOError: ``name`` is no schedule.
        """
        check_memory(name)
        if self.asked == "auto" and name != self.name:
            self.name, self.why = name, _OPEN if name == "auto" else "as before the state was saved that was loaded"
        self.largest = largest


def groups(points: Sequence[Point], device: torch.device, sequential: bool) -> list[tuple[int | None, Tensor]]:
    """Neighbouring points of one direction are evaluated together: (direction or None for θ itself, their signs).

    ``sequential`` evaluates each point by itself.
    """
    if sequential:
        return [group for point in points for group in groups([point], device, False)]
    found = itertools.groupby(points, key=lambda p: p.direction if p.coefficient else None)
    return [(direction, torch.tensor([p.coefficient for p in group], device=device)) for direction, group in found]
