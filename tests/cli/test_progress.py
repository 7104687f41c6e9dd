"""What a run says once its first step is done."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from zowrap import telling
from zowrap.cli.progress import Progress, started
from zowrap.telling import Telling


def report(**facts: Any) -> SimpleNamespace:
    usual = {"engine": "compiled", "compile_count": 3, "cached": 0, "compile_seconds": 12.34, "trace_seconds": 4.56}
    return SimpleNamespace(**{**usual, "schedule": "paired", "schedule_why": "both sides fit", **facts})


def test_a_first_start_says_how_long_it_took() -> None:
    assert started(report()) == "the step was traced in 4.6 s and compiled in 12.3 s"


def test_a_second_start_compiles_nothing_and_says_how_long_tracing_took() -> None:
    text = started(report(cached=3, compile_seconds=0.5))
    assert text == "the step was traced in 4.6 s and its code lay ready, loaded in 0.5 s"


def test_a_schedule_chosen_for_want_of_memory_is_told() -> None:
    text = started(report(schedule="sequential", schedule_why="paired needs 9 GB, 4 GB are free"))
    assert text.endswith("one side of a direction at a time (paired needs 9 GB, 4 GB are free)")


def test_what_runs_eagerly_compiles_nothing() -> None:
    assert started(report(engine="eager")) == "steps run eagerly"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_what_is_being_compiled_in_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    shown = Progress(SimpleNamespace(zm=None))
    tell = Telling(lambda: 60.0, "kept for the next start")
    shown.on_choose_lr(0, 16)
    try:
        with tell.during("capturing the step", finished=True):
            tell.region(2, 5)
            shown.bar.refresh()
            (task,) = shown.bar.tasks
            assert task.description == "compiling region 2 of 5, 0 s (about a minute the first time, then kept)"
        assert task.description == "choosing the learning rate"
        assert sys.stderr is not screen, "what others print meanwhile goes above the bar"
    finally:
        shown.stop()
    assert telling.shown_by is None and "compiling region 2 of 5" in screen.getvalue()
    assert "compiled the training step" not in screen.getvalue()


def test_a_bar_is_of_the_model_that_is_tuned_in_the_end() -> None:
    trainer = SimpleNamespace(zm="before")
    shown = Progress(trainer)
    trainer.zm = "wrapped again"
    assert shown.zm == "wrapped again"
