"""The parts of a wrapped model that its neighbours use: :class:`zowrap.ZOModel` is one such."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from zowrap.model.accumulator import Accumulator, Measurement
from zowrap.model.descent import Descent
from zowrap.model.result import StepResult
from zowrap.model.schedule import Schedule
from zowrap.step.job import Engine, Job
from zowrap.step.options import StepOptions


class Wrapped(Protocol):
    """A wrapped model as its state, the choice of its engine and its CUDA graphs see it."""

    model: nn.Module
    job: Job
    engine: Engine
    options: StepOptions
    schedule: Schedule
    accumulator: Accumulator
    descent: Descent
    seed: int
    step_count: int
    device_step: Tensor | None
    update_interrupted: bool

    @property
    def block(self) -> int: ...

    @property
    def hyper(self) -> dict[str, float]: ...

    @property
    def lr(self) -> float: ...

    def set_hyper(self, **values: float) -> None: ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]: ...

    def assign_credit(self, batch: dict[str, Any]) -> Measurement: ...

    def peek(self) -> tuple[Tensor, Tensor]: ...

    def accumulate(self, *batches: Any, **batch: Any) -> Tensor: ...

    def update(self) -> StepResult: ...

    def discard(self) -> None: ...

    def describe_step(self) -> dict[str, Any]: ...

    def writing(self) -> AbstractContextManager[None]: ...
