"""Choose the points of a step that are evaluated together: both sides of a direction in one program, or each by itself.

Paired is faster: every weight is read and all noise is drawn once for both sides. Sequential holds the activations of
one side at a time. Losses are the same up to rounding.

``memory="auto"`` leaves the choice to the first batch, whose sizes decide what a step needs: paired where it fits into
the free memory, else sequential. A larger batch may turn paired into sequential; nothing turns it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from zowrap import machine
from zowrap.checks import check_name
from zowrap.errors import ZOCaptureError
from zowrap.loss.module import Batch
from zowrap.machine import fits, format_bytes
from zowrap.names import MEMORY
from zowrap.step.job import Engine, Job

if TYPE_CHECKING:
    from zowrap.analysis.costs import CostModel

_OPEN = "it is chosen at the next step"


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
        check_name("memory", asked, MEMORY)
        self.asked = self.name = asked
        self.why = _OPEN if asked == "auto" else "as asked"
        self.largest = 0

    @property
    def sequential(self) -> bool:
        return self.name == "sequential"

    def settle(self, job: Job, engine: Engine, batch: Batch, choose_engine: Callable[[Batch], bool]) -> None:
        """Choose, where that is left open and ``batch`` is larger than any before; called before it is evaluated.

        Args:
            choose_engine: asked first: whether it made the engine another, which chooses for itself.
        """
        size = sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
        if size <= self.largest or engine.name == "eager":  # which evaluates each point by itself anyway
            return
        if choose_engine(batch):
            return
        if self.asked == "auto" and not self.sequential:
            from zowrap.analysis.costs import CostModel
            from zowrap.step.parameters import weight_bytes

            try:
                cost_model = CostModel(job, engine, self, batch)
                cost_model.engine.captured(batch)
            except ZOCaptureError:  # the engine says so itself, and runs eagerly
                return
            there = weight_bytes(job.loss.model) + job.state_bytes  # needed, but no longer free
            self.choose(cost_model, machine.free_memory(job.device) + there)
        self.largest = size

    def choose(self, cost_model: CostModel, free: int) -> None:
        """Choose for batches of the sizes that it was made for, unless a schedule was asked for.

        The exact analysis takes seconds: it is made only where a bound, which takes milliseconds, does not fit.

        Args:
            free: bytes free for the model, its state and a step.
        """
        if self.asked != "auto":
            return
        try:
            bound = cost_model.bound()
            paired, sequential = bound, bound
            if not machine.fits(bound, free):
                schedules = cost_model.costs().schedules
                paired, sequential = schedules["paired"], schedules["sequential"]
        except ZOCaptureError as error:
            self.name, self.why = "paired", f"it is faster; what it needs is not known: {error}"
            return
        self.name, self.why = choose_memory(paired, sequential, free)

    # --- what a state and a journal keep of it ------------------------------------------------------------------

    def record(self) -> dict[str, str | int]:
        """``{"memory": name, "largest_batch": elements}``."""
        return {"memory": self.name, "largest_batch": self.largest}

    def take(self, name: str, largest: int) -> None:
        """Go on from a :meth:`record`. A schedule that was asked for stays.

        Raises:
            ZOError: ``name`` is no schedule.
        """
        check_name("memory", name, MEMORY)
        if self.asked == "auto" and name != self.name:
            self.name, self.why = name, _OPEN if name == "auto" else "as when the loaded state was saved"
        self.largest = largest


def choose_memory(paired: int, sequential: int, free: int) -> tuple[str, str]:
    """The schedule for ``memory="auto"``, and why, in words.

    Args:
        paired, sequential: predicted peak bytes under each, see :attr:`zowrap.analysis.costs.Costs.schedules`.
        free: bytes free, see :func:`free_memory`; where the model is loaded already, its weights and state added back.

    Returns:
        ``"paired"``, the faster one, unless only ``"sequential"`` fits.
    """
    if fits(paired, free):
        return "paired", "it is faster, and fits"
    if sequential >= paired:
        return "paired", f"sequential would need no less than its {format_bytes(paired)}"
    needs = (
        f"paired needs {format_bytes(paired)} and {format_bytes(free)} are free, sequential needs "
        f"{format_bytes(sequential)}"
    )
    if fits(sequential, free):
        return "sequential", needs
    return "sequential", f"{needs}: neither fits, it comes closest"
