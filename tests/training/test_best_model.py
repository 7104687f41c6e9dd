"""The best evaluation of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zowrap.training.best_model import BestModel


def best_of(lines: list[dict[str, Any]], **options: Any) -> BestModel:
    best = BestModel(**options)
    for step, line in enumerate(lines):
        if best.is_beaten_by({"step": step, **line}):
            best.keep({"step": step, **line})
    return best


def test_nothing_is_the_best_before_an_evaluation() -> None:
    best = BestModel()
    assert (best.step, best.value, best.key) == (None, None, None)
    assert not best.is_beaten_by({"step": 0, "eval_runtime": 1.0})
    assert best.is_beaten_by({"step": 0, "eval_loss": 1.0}) and best.step is None  # it is not kept yet


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ({"eval_loss": 1.0}, "eval_loss"),
        ({"eval_loss": 1.0, "eval_accuracy": 0.5}, "eval_accuracy"),
        ({"eval_dev_loss": 1.0, "eval_test_loss": 2.0, "eval_test_accuracy": 0.5}, "eval_test_accuracy"),
        ({"eval_dev_loss": 1.0, "eval_test_loss": 2.0}, "eval_dev_loss"),
    ],
)
def test_accuracy_decides_where_there_is_one_else_the_loss(line: dict[str, Any], key: str) -> None:
    best = best_of([line])
    assert (best.key, best.step, best.value) == (key, 0, line[key])


def test_the_metric_stays_the_one_of_the_first_evaluation() -> None:
    best = best_of([{"eval_loss": 1.0}, {"eval_loss": 2.0, "eval_accuracy": 1.0}])
    assert (best.key, best.step) == ("eval_loss", 0)


@pytest.mark.parametrize("metric", ["f1", "eval_f1"])
def test_the_metric_asked_for_decides(metric: str) -> None:
    lines = [{"eval_f1": 0.3, "eval_loss": 1.0}, {"eval_f1": 0.2, "eval_loss": 0.5}, {"eval_f1": 0.4, "eval_loss": 9.0}]
    assert best_of(lines, metric=metric).step == 2
    assert best_of(lines, metric=metric, greater_is_better=False).step == 1
    assert best_of([{"eval_loss": 1.0}], metric=metric).step is None


def test_a_metric_is_better_the_greater_and_a_loss_the_smaller() -> None:
    lines = [{"eval_loss": 2.0}, {"eval_loss": 1.0}, {"eval_loss": 3.0}]
    assert best_of(lines).step == best_of(lines, metric="loss").step == 1
    # The direction is that of the metric asked for: without one it means nothing.
    assert best_of(lines, greater_is_better=True).step == 1
    assert best_of(lines, metric="loss", greater_is_better=True).step == 2


def test_the_loss_decides_between_equal_accuracies() -> None:
    accuracies = [{"eval_accuracy": 0.5, "eval_loss": loss} for loss in (2.0, 1.0, 1.0, 3.0)]
    assert best_of(accuracies).step == 1  # the first of those with the lowest loss
    assert best_of([*accuracies, {"eval_accuracy": 0.6, "eval_loss": 9.0}]).step == 4
    named = [{"eval_dev_accuracy": 0.5, "eval_dev_loss": loss, "eval_test_loss": -loss} for loss in (2.0, 1.0)]
    assert best_of(named).step == 1  # the loss is that of the same evaluation set
    assert best_of([{"eval_accuracy": 0.5}, {"eval_accuracy": 0.5}]).step == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, None])  # None as it is read back from metrics.jsonl
def test_an_evaluation_that_is_not_finite_is_never_the_best(value: float | None) -> None:
    for name in ("eval_loss", "eval_accuracy", "eval_other_loss"):
        line = {"eval_accuracy": 0.9, "eval_loss": 1.0, name: value}
        best = best_of([line, {"eval_accuracy": 0.5, "eval_loss": 1.0}])
        assert (best.step, best.value) == (1, 0.5)
