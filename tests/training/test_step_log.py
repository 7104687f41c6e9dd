"""The log of a run's steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zowrap.training.step_log import StepLog, make_metrics_line


def record(loss: float, *projected_grad: float, skipped: bool = False, step: int = 0) -> dict[str, Any]:
    grads = list(projected_grad or (1.0,))
    return {"step": step, "loss": loss, "projected_grad": grads, "lr": 0.1, "skipped": skipped}


def test_a_window_holds_the_means_since_the_last_one() -> None:
    log = StepLog()
    for loss, grads in ((1.0, (2.0, -4.0)), (2.0, (-1.0, 1.0))):
        log.add(record(loss, *grads))
    assert log.take_window() == {"loss": 1.5, "projected_grad": 2.0}
    log.add(record(6.0, -5.0))
    assert log.take_window() == {"loss": 6.0, "projected_grad": 5.0}
    assert log.mean_loss() == 3.0


def test_an_empty_log_has_no_loss() -> None:
    log = StepLog()
    window = log.take_window()
    assert window.keys() == {"loss"} and math.isnan(window["loss"]) and math.isnan(log.mean_loss())


def test_skipped_steps_are_counted_and_left_out_of_the_means() -> None:
    log = StepLog()
    for loss in (math.nan, 1.0, math.inf, math.nan):
        log.add(record(loss, skipped=not math.isfinite(loss)))
    assert (log.skipped, log.skipped_in_a_row, log.mean_loss()) == (3, 2, 1.0)
    assert log.take_window() == {"loss": 1.0, "projected_grad": 1.0, "skipped_steps": 3}
    log.add(record(2.0))
    assert (log.skipped, log.skipped_in_a_row) == (3, 0)
    log.add(record(5.0, skipped=True))  # its projected gradient was not finite
    assert (log.skipped, log.skipped_in_a_row) == (4, 1)
    assert log.take_window()["skipped_steps"] == 4


def test_steps_logged_before_count_in_the_run_alone() -> None:
    log = StepLog()
    log.add(record(1.0), logged=True)
    log.add(record(math.nan, skipped=True), logged=True)
    log.add(record(3.0, -2.0))
    assert log.take_window() == {"loss": 3.0, "projected_grad": 2.0, "skipped_steps": 1}
    assert log.mean_loss() == 2.0


@pytest.mark.parametrize(("grads", "written"), [((0.5,), 0.5), ((0.5, -1.0), [0.5, -1.0])])
def test_a_metrics_line_counts_the_steps_done(grads: tuple[float, ...], written: Any) -> None:
    line = make_metrics_line(record(1.5, *grads, step=4), 0.12345678)
    assert line == {"step": 5, "loss": 1.5, "projected_grad": written, "lr": 0.1, "seconds": 0.123457}
    skipped = make_metrics_line(record(1.5, *grads, step=4, skipped=True), None)
    assert skipped == {**line, "skipped": True, "seconds": None} and list(skipped)[-1] == "seconds"
