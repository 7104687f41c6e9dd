"""Labels: the same class in every format; measurements and ids are no classes."""

from __future__ import annotations

import decimal
import logging
from typing import Any

import pytest

from zowrap.errors import ZOError
from zowrap.tasks.labels import check_classes, collect_labels, label_index, list_numbers, read_label
from zowrap.tasks.rows import Row, Rows

NAN = float("nan")


def rows_of(*labels: Any) -> Rows:
    return Rows(Row({"label": label}, f"f line {i}") for i, label in enumerate(labels, 1))


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ((10, 9, 10), ["9", "10"]),
        (("10", "9"), ["9", "10"]),
        ((0.0, 1.0), ["0", "1"]),
        (("0.0", "1.0", "1"), ["0", "1"]),
        (("1e0", "0e0"), ["0", "1"]),
        ((decimal.Decimal("2.0"), 1), ["1", "2"]),
        ((-1.0, 1.0), ["-1", "1"]),
        ((True, False), ["false", "true"]),
        (("True", "False"), ["false", "true"]),
        (("TRUE", True, "false"), ["false", "true"]),
        (("2.0", "beta"), ["2.0", "beta"]),  # a number among names is a name
        (("1.5b", "2"), ["1.5b", "2"]),
        (("02", "01"), ["01", "02"]),
        ((" x ", "y"), ["x", "y"]),
    ],
)
def test_labels_are_read_alike_in_every_format(labels: tuple, want: list[str]) -> None:
    rows = rows_of(*labels)
    found = collect_labels(rows, "label")
    assert found == want
    assert {label_index(row, "label", found) for row in rows} == set(range(len(found)))


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ((1, 1.5), r"f line 2: label 'label' is the number 1\.5, a measurement"),
        (("4.2", "0.8", "5.0"), r"f line 1: label 'label' is 4\.2, a measurement"),
        (("5.0", "0.5"), r"f line 2: .* 0\.5, a measurement"),
        (("1e-3", "2"), "a measurement"),
        (("4,2", "3"), "label 'label' is 4,2, a measurement"),
        ((1.0, NAN), "f line 2: label 'label' is missing"),
        (("1.0", "0.0", "nan"), "f line 3: label 'label' is 'nan' where the other labels are numbers"),
        (("0", "NA"), "is 'NA' where the other labels are numbers"),
        ((None,), "null"),
        (("",), "empty"),
        (([1],), "a list"),
        ((float("inf"),), "a measurement"),
    ],
)
def test_what_is_no_class_is_refused_by_line(labels: tuple, sentence: str) -> None:
    with pytest.raises(ZOError, match=sentence):
        collect_labels(rows_of(*labels), "label")


def test_labels_may_be_strings_integers_or_booleans() -> None:
    assert [read_label(row, "label") for row in rows_of(True, 3, " x ", 3.0)] == ["true", "3", "x", "3"]
    for value in (True, "1", 1, "1.0", "True"):
        (row,) = rows_of(value)
        assert label_index(row, "label", ["no", "yes"], numbered=True) == 1
        with pytest.raises(
            ZOError, match=r"label '(true|True|1|1.0)' is not one of the labels of training \('no', 'yes'"
        ):
            label_index(row, "label", ["no", "yes"])


def test_a_number_is_the_one_that_the_task_says() -> None:
    stars, numbers = ["1 star", "2 stars", "3 stars"], [1, 2, 3]
    assert [label_index(row, "label", stars, True, numbers) for row in rows_of(1, "3", 2.0)] == [0, 2, 1]
    with pytest.raises(ZOError, match="label '0' is not one of the labels"):
        label_index(rows_of(0)[0], "label", stars, True, numbers)


def test_names_that_the_user_gives_may_look_like_measurements() -> None:
    assert [label_index(row, "label", ["3.9", "3.10"]) for row in rows_of("3.10", "3.9")] == [1, 0]


def test_the_file_names_its_classes() -> None:
    rows = Rows(rows_of("b", "a"), {"label": ["c", "b", "a"]})
    assert collect_labels(rows, "label") == ["c", "b", "a"]
    with pytest.raises(ZOError, match=r"f line 2: label '-1' is none of the classes .* without a label"):
        collect_labels(Rows(rows_of("b", -1), {"label": ["a", "b"]}), "label")


def test_numbers_are_listed_where_all_labels_are_such() -> None:
    assert list_numbers(rows_of(1, "2.0", True), "label") == {1, 2}
    assert list_numbers(rows_of(1, "x"), "label") == set()


def test_a_column_of_ids_is_noticed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("zowrap"), "propagate", True)
    for ids in (range(100, 130), [f"r{i}" for i in range(30)]):
        with pytest.raises(
            ZOError, match="each of the 30 rows has a label of its own in column 'label', as if it held"
        ):
            check_classes(collect_labels(rows_of(*ids), "label"), 30, "label")
    assert caplog.text == ""
    check_classes(list("abcdef"), 7, "label")
    assert "column 'label' has 6 labels in 7 rows" in caplog.text
    caplog.clear()
    check_classes(list("abcdef"), 24, "label")
    assert caplog.text == ""
    check_classes(["Good", "bad", "good"], 9, "label")
    assert "'Good' and 'good' differ in case alone" in caplog.text
