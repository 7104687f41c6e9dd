"""A training that ends as when the machine goes down."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class CrashAfter(TrainerCallback):
    """Ends a training with an error after step ``step``, when the step's record is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("the machine went down")
