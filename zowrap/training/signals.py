"""Signals that stop a run: the first SIGINT or SIGTERM ends it after the current step, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Interrupted(Exception):
    """Raised to leave an evaluation, or the choice of a learning rate, when the run was asked to stop."""


@dataclass
class StopSignal:
    """A request to stop: whether one has arrived, and the name of the signal."""

    stopped: bool = False
    name: str = ""


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM in place of dying from them; the earlier handlers are back afterwards.

    One that a callback put in place in the meantime stays.

    Only the main thread can handle signals: in any other, nothing changes.
    """
    asked = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        if asked.stopped:
            raise KeyboardInterrupt
        asked.stopped, asked.name = True, signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
