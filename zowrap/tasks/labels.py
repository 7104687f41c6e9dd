"""Read the labels of rows: strings, whole numbers and booleans mean the same class in every format.

A CSV has only text in it, and pandas writes whole numbers beside a missing one as ``0.0``: where all labels of a column
are numbers, they are read as numbers. A column of measurements, or one that is different in every row, is no label.
"""

from __future__ import annotations

import decimal
import logging
import math
import re
from collections.abc import Iterable, Sequence

from zowrap.errors import ZOError, list_some
from zowrap.tasks.rows import Row, check_encodable, describe_type, read_value

log = logging.getLogger("zowrap")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WITH_COMMA = re.compile(r"[+-]?\d+,\d+")  # a decimal comma, or one that groups digits: no class either way
_MISSING = {"nan", "na", "n/a", "null", "none", "-"}  # what tables write into a column of numbers where one is missing
_BOOLEANS = {"false": "0", "true": "1"}

# A label for every row is a column of ids. In a few rows it can be chance, so it is only told of.
_ROWS_OF_IDS = 20
_FEWEST_IDS = 5


def read_label(row: Row, column: str) -> str:
    """Read the label in ``column`` as a string: ``3`` and ``3.0`` → ``"3"``, ``True`` → ``"true"``.

    Raises:
        ZOError: the column is missing, null, empty, or neither a string, a whole number nor a boolean.
    """
    value = read_value(row, column, "--label-column")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | decimal.Decimal):
        if math.isnan(value):
            raise ZOError(f"{row.where}: label {column!r} is missing (it is not a number)")
        if math.isfinite(value) and value == int(value):
            return str(int(value))
        raise _measured(row, column, f"the number {value}")
    if not isinstance(value, str):
        raise ZOError(
            f"{row.where}: label {column!r} is {describe_type(value)}, but must be a string, an integer or a boolean"
        )
    if not value.strip():
        raise ZOError(f"{row.where}: label {column!r} is empty")
    return check_encodable(value.strip(), row, f"label {column!r}")


def collect_labels(rows: Sequence[Row], column: str) -> list[str]:
    """Collect the classes of a column in the order of their numbers.

    The order is that of the file where it names its classes (:class:`zowrap.tasks.rows.Rows`), else numerical if all
    labels are whole numbers, else alphabetical.

    Raises:
        ZOError: the labels are measurements, or a row has none.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(read_label(row, column), row)
    classes = getattr(rows, "classes", {}).get(column)
    if classes is not None:
        for name, row in first.items():
            if name not in classes:
                unlabelled = " (-1 is a row without a label)" if name == "-1" else ""
                raise ZOError(f"{row.where}: label {name!r} is none of the classes that the file names{unlabelled}")
        return list(classes)
    names = {_read_plain(name) for name in first} if _are_plain(first, column) else set(first)
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else sorted(names)


def are_numbers(names: Iterable[str]) -> bool:
    """Whether every label is a whole number."""
    return all(re.fullmatch(r"-?\d+", name) for name in names)


def label_index(
    row: Row,
    column: str,
    labels: Sequence[str],
    numbered: bool = False,
    numbers: Sequence[int | None] | None = None,
) -> int:
    """The index of this row's label in ``labels``.

    A row names its label. If ``numbered``, it may give a number instead (``false`` is 0, ``true`` is 1): one of
    ``numbers``, which has the number of each label, or by default the index itself.

    Raises:
        ZOError: the label is not one of ``labels``.
    """
    name = read_label(row, column)
    for each in (name, _read_plain(name)):
        if each in labels:
            return list(labels).index(each)
    number = _BOOLEANS.get(_read_plain(name), _read_plain(name))
    if numbered and number.isdecimal() and not any(label.isdecimal() for label in labels):
        known_numbers = list(range(len(labels)) if numbers is None else numbers)
        if int(number) in known_numbers:
            return known_numbers.index(int(number))
    known = list_some(map(repr, labels))
    raise ZOError(f"{row.where}: label {name!r} is not one of the labels of training ({known})")


def list_numbers(rows: Sequence[Row], column: str) -> set[int]:
    """List the whole numbers that rows have as labels; empty unless all labels are such."""
    names = {_read_plain(read_label(row, column)) for row in rows}
    names = {_BOOLEANS.get(name, name) for name in names}
    return {int(name) for name in names} if are_numbers(names) else set()


def _read_plain(name: str) -> str:
    """Read a number or a boolean that a table wrote in a way of its own: ``1.0`` → ``1``, ``True`` → ``true``."""
    if name.lower() in _BOOLEANS:
        return name.lower()
    if not re.fullmatch(r"-?\d+", name) and _NUMBER.fullmatch(name):
        value = float(name)
        if math.isfinite(value) and value == int(value):
            return str(int(value))
    return name


def _are_plain(first: dict[str, Row], column: str) -> bool:
    """Whether all labels are numbers or all are booleans, whatever way they are written.

    Args:
        first: each label with the first row that has it.
    """
    if all(name.lower() in _BOOLEANS for name in first):
        return True
    numbers = [name for name in first if _NUMBER.fullmatch(name) or _WITH_COMMA.fullmatch(name)]
    others = [name for name in first if name not in numbers]
    if not numbers or any(name.lower() not in _MISSING for name in others):
        return False
    if others:
        raise ZOError(
            f"{first[others[0]].where}: label {column!r} is {others[0]!r} where the other labels are numbers: remove "
            "the rows without a label, or name the classes with --labels"
        )
    for name in numbers:
        if not are_numbers([_read_plain(name)]):
            raise _measured(first[name], column, name)
    return True


def _measured(row: Row, column: str, value: str) -> ZOError:
    return ZOError(
        f"{row.where}: label {column!r} is {value}, a measurement: classes are names, whole numbers or booleans; put "
        "measurements into classes first, or name another column with --label-column"
    )


def check_classes(names: Sequence[str], rows: int, column: str) -> None:
    """Notice a column of ids, and names that differ in case alone, where only the data say what the classes are.

    Args:
        names: the classes that were found in ``column``.
        rows: the number of rows.

    Raises:
        ZOError: every row has a label of its own.
    """
    count = len(names)
    if count == rows >= _ROWS_OF_IDS:
        raise ZOError(
            f"each of the {rows} rows has a label of its own in column {column!r}, as if it held ids: name the column "
            "of the classes with --label-column, or the classes with --labels"
        )
    if count >= _FEWEST_IDS and 2 * count > rows:
        log.warning(
            "column %r has %d labels in %d rows: is it a column of ids? --label-column names another",
            column,
            count,
            rows,
        )
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(name.casefold(), name)
        if other != name:
            log.warning("the labels %r and %r differ in case alone, and are two classes", other, name)
