"""Stopping politely: the first SIGINT or SIGTERM asks the run to end after its step, a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopSignal:
    """Whether, and by what, the run was asked to stop."""

    stopped: bool = False
    name: str = ""


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying from them; what handled them before is back afterwards.

    Only the main thread may handle signals: elsewhere nothing changes.
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
            signal.signal(number, handler)
