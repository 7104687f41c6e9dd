"""``history.jsonl``: what the Trainer knows of a run beside its steps, so that a run that goes on knows it too.

A checkpoint holds the Trainer's state, but evaluations and logs also come between two checkpoints, and a run that was
killed goes on after them. Each line has the ``step`` after which it was written, and

    log       one entry of the Trainer's log, or
    states    the states of the callbacks that have one, with the best metric so far; only where something changed
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from transformers import TrainerState

from zowrap.errors import ZOError
from zowrap.storage.lines import Lines
from zowrap.training.callback_states import States
from zowrap.training.messages import say

_BEST = ("best_metric", "best_global_step")


class History(Lines):
    """The history of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._last: dict[str, Any] | None = None

    def add_log(self, entry: dict[str, Any], step: int) -> None:
        """Append an entry of the Trainer's log."""
        self.append({"step": step, "log": entry})

    def add_states(self, states: States, state: TrainerState) -> None:
        """Append the states of the callbacks after a step, if they or the best metric changed."""
        facts = {"states": states, **{name: getattr(state, name) for name in _BEST}}
        if states and facts != self._last:
            self._last = facts
            self.append({"step": state.global_step, **facts})

    def has_states(self) -> bool:
        """Whether any callback of the run has a state."""
        return any("states" in line for _, line in self._lines())

    def keep(self, steps: int) -> None:
        """Cut off what was written after step ``steps``, and what is damaged."""
        end = 0
        self._last = None
        for stop, line in self._lines():
            if line["step"] > steps:
                break
            end = stop
        self.cut(end)

    def apply(self, state: TrainerState, after: int, until: int) -> None:
        """Bring the Trainer's state from step ``after``, whose checkpoint holds it, to step ``until``."""
        for _, line in self._lines():
            if not (after or -1) < line["step"] <= until:
                continue
            if isinstance(line.get("log"), dict):
                # A number that is not finite is null in JSON.
                entry = {name: math.nan if value is None else value for name, value in line["log"].items()}
                state.log_history.append(entry)
                state.epoch = entry.get("epoch", state.epoch)
            elif isinstance(line.get("states"), dict):
                state.stateful_callbacks = line["states"]
                for name in _BEST:
                    setattr(state, name, line.get(name))

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (byte after the line, line), up to a damaged one: no run fails for its history."""
        try:
            for _, stop, line in self.read():
                if isinstance(line.get("step"), int):
                    yield stop, line
        except ZOError as error:
            say(f"{error}: the log goes on from there")
