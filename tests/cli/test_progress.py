"""What a run says once its first step is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from zowrap.cli.progress import started


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
