"""Saying that a step is being compiled while it is, for that takes a minute the first time.

On a terminal it is one line of standard error, kept up to date; elsewhere one line before it begins. Standard output is
never written to. Who draws on the terminal, as the command line's bar does, shows the line in its own place by
:data:`shown_by`.

It is said unless the level of the logger ``zowrap`` itself is set above INFO:
``logging.getLogger("zowrap").setLevel(logging.WARNING)`` silences it. Where that logger takes INFO and has handlers,
what would go to a file or a pipe goes to them.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

log = logging.getLogger("zowrap")

# Called once a second with the line, and with None when it is over.
shown_by: Callable[[str | None], None] | None = None
SECONDS = 1.0  # between two updates of the line
_now = time.monotonic


class Telling:
    """The lines in which one engine reports its compilations.

    Args:
        takes: seconds that the first one is thought to take; asked when there is something to say.
        kept: where its result is kept, in words.
        silent: say nothing.
    """

    def __init__(self, takes: Callable[[], float], kept: str, silent: bool = False) -> None:
        self.takes, self.kept, self.silent = takes, kept, silent
        self.phase = ""
        self._began: float | None = None  # of the program that is being made
        self._first = True
        self._announced = False
        self._depth = 0
        self._width = 0
        self._lock = threading.Lock()
        self._over = threading.Event()

    @contextlib.contextmanager
    def during(self, phase: str, finished: bool = False) -> Iterator[None]:
        """Around work that takes its time; where it is inside of other such work, that goes on afterwards.

        Args:
            finished: a program is then ready to run.
        """
        if self.silent or log.level > logging.INFO:
            yield
            return
        before, self.phase = self.phase, phase
        if self._began is None:
            self._began, self._announced = _now(), False
        if self._first:
            self._announce(f"compiling the training step: {about(self.takes())} the first time, {self.kept}")
        self._depth += 1
        watch = self._watch() if self._depth == 1 and self._live() else None
        ready = False
        try:
            yield
            ready = finished
        finally:
            self._depth -= 1
            self.phase = before
            if watch is not None:
                self._over.set()
                watch.join()
                self._end(ready)
            if ready:
                self._began, self._first = None, False

    def now(self, phase: str) -> None:
        """Say what is being done inside of :meth:`during`."""
        self.phase = phase
        if self._depth:
            self._announce("compiling one more program of the step, for another block or kind of batch")
            if self._live():
                self._show()

    def region(self, number: int, count: int) -> None:
        """Say which part of a program is being compiled."""
        self.now(f"compiling region {number} of {count}")

    # --- where it is shown ------------------------------------------------------------------------------------

    def _live(self) -> bool:
        """Whether there is a line that can be kept up to date."""
        return shown_by is not None or _is_terminal()

    def _announce(self, text: str) -> None:
        """Say once for each program, where no line is kept up to date, what is about to take its time."""
        if self._announced or self._live():
            return
        self._announced = True
        say(text)

    def _watch(self) -> threading.Thread:
        """Keep the line up to date until :attr:`_over`."""
        self._over.clear()
        self._show()

        def update() -> None:
            while not self._over.wait(SECONDS):
                self._show()

        thread = threading.Thread(target=update, daemon=True)
        thread.start()
        return thread

    def _text(self) -> str:
        seconds = 0.0 if self._began is None else _now() - self._began
        # A busy machine takes longer than was thought, and the line then knows better.
        hint = f" ({about(max(self.takes(), seconds))} the first time, then kept)" if self._first else ""
        return f"{self.phase}, {seconds:.0f} s{hint}"

    def _show(self) -> None:
        with self._lock:
            text = self._text()
            if shown_by is not None:
                shown_by(text)
            else:
                self._redraw(text)

    def _redraw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        _write(f"\r{text:<{self._width}}")
        self._width = len(text)

    def _end(self, ready: bool) -> None:
        """Leave one line that says how long the first program took, and nothing of any other."""
        with self._lock:
            if shown_by is not None:
                shown_by(None)
                return
            seconds = 0.0 if self._began is None else _now() - self._began
            if ready and self._first:
                self._redraw(f"compiled the training step in {seconds:.0f} s")
                _write("\n")
            else:
                self._redraw("")
                _write("\r")
            self._width = 0


def say(text: str) -> None:
    """One line for people: to the logger where it has handlers, else to standard error."""
    if log.level > logging.INFO:
        return
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(text)
    else:
        _write(f"{text}\n")


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _write(text: str) -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a message is no reason to fail
        sys.stderr.write(text)
        sys.stderr.flush()


def about(seconds: float) -> str:
    """A number of seconds as honestly as it is known."""
    for limit, words in ((10, "some seconds"), (20, "a quarter of a minute"), (45, "half a minute"), (90, "a minute")):
        if seconds < limit:
            return words if words.startswith("some") else f"about {words}"
    return f"about {round(seconds / 60)} minutes"
