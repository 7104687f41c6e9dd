"""What is said while a step is being compiled: one line, on standard error alone, and only when something is."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
import torch

import zowrap
from zowrap import telling
from zowrap.telling import Telling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def isatty(self) -> bool:
        raise ValueError("I/O operation on closed file")

    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file")


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The logger as a program finds it, whatever other tests did to it."""
    log = logging.getLogger("zowrap")
    before = log.level, log.handlers[:], log.propagate
    log.setLevel(logging.NOTSET)
    log.handlers[:], log.propagate = [], False
    yield log
    log.level, log.handlers[:], log.propagate = before


def compile_twice(tell: Telling, kinds: int = 2) -> None:
    """What an engine does: a program with its capture, later one that brings nothing new."""
    with tell.during("capturing the step"):
        pass
    with tell.during("capturing the step", finished=True):
        for number in range(kinds):
            tell.region(number + 1, kinds)
    with tell.during("capturing the step", finished=True):
        pass


def line(**options: bool) -> Telling:
    return Telling(lambda: 60.0, "kept for the next start", **options)


FIRST = "compiling the training step: about a minute the first time, kept for the next start"


def test_in_a_pipe_one_line_says_it_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    tell = line()
    with tell.during("capturing the step"):
        assert capsys.readouterr().err == FIRST + "\n"
    compile_twice(tell)
    assert capsys.readouterr() == ("", "")
    with tell.during("capturing the step", finished=True):
        tell.region(1, 1)
        tell.now("compiling the update")
    assert capsys.readouterr().err == "compiling one more program of the step, for another block or kind of batch\n"


def test_a_terminal_has_one_line_that_is_kept_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    compile_twice(line())
    shown = [part.rstrip() for part in screen.getvalue().split("\r")]
    assert "capturing the step, 0 s (about a minute the first time, then kept)" in shown
    assert "compiling region 2 of 2, 0 s (about a minute the first time, then kept)" in shown
    assert screen.getvalue().count("\n") == 1 and "compiled the training step in 0 s" in shown
    assert screen.getvalue().endswith("\r"), "what a later program said is not left standing"


def test_the_line_counts_the_seconds_while_nothing_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, came = Terminal(), telling.threading.Event()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(telling, "SECONDS", 0.001)
    clock = iter(range(1000))

    def monotonic() -> float:
        second = float(next(clock))
        if second > 3:
            came.set()
        return second

    monkeypatch.setattr(telling, "_now", monotonic)
    with line().during("capturing the step", finished=True):
        assert came.wait(30)
    assert "capturing the step, 1 s" in screen.getvalue() and "capturing the step, 2 s" in screen.getvalue()


def test_the_line_knows_better_where_it_takes_longer_than_was_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = Terminal(), iter((0.0, 100.0, 130.0, 131.0))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(telling, "_now", lambda: next(clock))
    monkeypatch.setattr(telling, "SECONDS", 3600.0)
    with line().during("capturing the step", finished=True):
        pass
    assert "capturing the step, 100 s (about 2 minutes the first time" in screen.getvalue()


def test_a_line_is_no_longer_than_the_terminal_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    compile_twice(line())
    assert max(map(len, screen.getvalue().replace("\n", "\r").split("\r"))) < 40


def test_whoever_draws_on_the_terminal_shows_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, shown = Terminal(), []
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(telling, "shown_by", shown.append)
    compile_twice(line())
    assert screen.getvalue() == "" and shown[-1] is None
    assert [text for text in shown if text][1].startswith("capturing the step, 0 s")
    assert any(text and text.startswith("compiling region 1 of 2") for text in shown)


def test_a_failure_leaves_no_line_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(RuntimeError), line().during("capturing the step", finished=True):
        raise RuntimeError
    assert "\n" not in screen.getvalue() and screen.getvalue().split("\r")[-2].strip() == ""


@pytest.mark.parametrize("stream", [None, Closed()])
def test_it_does_not_fail_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, stream: object) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    compile_twice(line())


def test_the_level_of_the_logger_silences_it(
    capsys: pytest.CaptureFixture[str], logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.setLevel(logging.WARNING)
    compile_twice(line())
    telling.say("something")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    compile_twice(line())
    assert screen.getvalue() == ""
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_handlers_that_want_it_get_it(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    logger.setLevel(logging.INFO)
    compile_twice(line())
    assert stream.getvalue() == FIRST + "\n" and capsys.readouterr().err == ""


def test_how_long_it_takes_is_said_no_more_precisely_than_it_is_known() -> None:
    said = [telling.about(seconds) for seconds in (2, 12, 36, 60, 200)]
    assert said == ["some seconds", "about a quarter of a minute", "about half a minute", "about a minute",
                    "about 3 minutes"]  # fmt: skip


def squared(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch["x"]).square().mean(-1)


def test_a_step_that_compiles_says_so_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    zm = zowrap.zo_wrap(torch.nn.Linear(4, 2), lr=1e-3, loss_fn=squared, engine="compiled", memory="auto")
    zm.step(x=torch.ones(3, 4))
    assert capsys.readouterr() == (
        "",
        "compiling the training step: about half a minute the first time, kept for the next start\n",
    )
    zm.step(x=torch.ones(3, 4))
    zm.step(x=torch.ones(5, 4))  # another size is the same program
    assert capsys.readouterr() == ("", "")


def test_what_compiles_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    zowrap.zo_wrap(torch.nn.Linear(4, 2), lr=1e-3, loss_fn=squared, engine="eager").step(x=torch.ones(3, 4))
    shapes = zowrap.zo_wrap(torch.nn.Linear(4, 2, device="meta"), lr=1e-3, loss_fn=squared, engine="compiled")
    shapes.engine.captured({"x": torch.ones(3, 4, device="meta")})
    assert capsys.readouterr() == ("", "")
