"""Read labelled or plain text from JSON lines, JSON, CSV or Parquet files, or from a data set on the Hugging Face hub.

A file becomes a list of :class:`Row`, each of which knows its place, so that every error about its contents names the
file and the line. Nothing here needs a tokenizer or a model: a command reads and checks its data before it loads
anything large.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError, first_line

_HUB_NAME = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w\[\]%:+.-]+))?$")

_QUICK_TO_READ = 50_000_000  # bytes that are read and decoded in a fraction of a second


@dataclass(frozen=True)
class Row:
    """One record of a data file.

    Attributes:
        values: column name → value, as read.
        where: its place, for messages, such as ``"train.jsonl line 3"``.
        index: its number in the file, from 0.
    """

    values: dict[str, Any]
    where: str
    index: int = 0


def read_rows(source: str, default_split: str = "train") -> list[Row]:
    """Read all rows of a file, or of ``name[:split]`` on the hub.

    Args:
        source: path of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, or a hub name.
        default_split: the split of a hub data set if ``source`` names none.

    Raises:
        ZOError: the source is missing, empty or unreadable; the message names the line if there is one.
    """
    check_source(source)
    path = Path(source)
    if path.is_file():
        try:
            rows = list(_READERS.get(path.suffix.lower(), _read_by_content)(path))
        except OSError as error:
            raise ZOError(f"{source} cannot be read: {error.strerror or error}") from error
    else:
        rows = _read_hub(source, default_split)
    if not rows:
        raise ZOError(f"{source} is empty: it has no rows")
    return [Row(row.values, row.where, index) for index, row in enumerate(rows)]


def check_source(source: str) -> None:
    """Raise :class:`ZOError` unless ``source`` is a file of a known format, or could be a data set on the hub."""
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file():
        if reader is None:
            _reader_by_content(path)
    elif path.is_dir():
        raise ZOError(f"{source} is a directory: give a .jsonl, .csv or .parquet file")
    elif reader is not None or source.startswith((".", "/", "~")) or not _HUB_NAME.match(source):
        raise ZOError(f"no such file: {source}")


def read_first_row(source: str) -> Row | None:
    """Read the first row of a file if that takes no time (JSON lines or CSV, and not too large); else return None.

    Raises:
        ZOError: the file is empty or cannot be read.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file() or reader not in (_read_jsonl, _read_csv) or path.stat().st_size > _QUICK_TO_READ:
        return None
    try:
        row = next(reader(path), None)
    except OSError as error:
        raise ZOError(f"{source} cannot be read: {error.strerror or error}") from error
    if row is None:
        raise ZOError(f"{source} is empty: it has no rows")
    return row


def read_text(row: Row, column: str, option: str = "--text-column") -> str:
    """Read the text in ``column``.

    Raises:
        ZOError: the column is missing, null, or not a string.
    """
    value = _read_value(row, column, option)
    if not isinstance(value, str):
        raise ZOError(f"{row.where}: column {column!r} is {_describe_type(value)}, not text")
    return check_encodable(value, row, f"column {column!r}")


def check_encodable(text: str, row: Row, what: str) -> str:
    """Return ``text`` if it can be encoded: JSON escapes can name half of a surrogate pair, which is not a character.

    Raises:
        ZOError: the text holds such a half.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ZOError(f"{row.where}: {what} holds \\u{half:04x}, half of a surrogate pair without the other") from error
    return text


def read_label(row: Row, column: str) -> str:
    """Read the label in ``column`` as a string: ``3`` → ``"3"``, ``True`` → ``"true"``.

    Raises:
        ZOError: the column is missing, null, empty, or neither a string, an integer nor a boolean.
    """
    value = _read_value(row, column, "--label-column")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ZOError(
            f"{row.where}: label {column!r} is {_describe_type(value)}, but must be a string, an integer or a boolean"
        )
    if not value.strip():
        raise ZOError(f"{row.where}: label {column!r} is empty")
    return check_encodable(value.strip(), row, f"label {column!r}")


def collect_labels(rows: Sequence[Row], column: str) -> list[str]:
    """Collect the distinct labels in the order of their numbers: numerical if all are integers, else alphabetical."""
    names = {read_label(row, column) for row in rows}
    return sorted(names, key=int) if are_numbers(names) else sorted(names)


def are_numbers(names: Iterable[str]) -> bool:
    """Whether every label is an integer."""
    return all(re.fullmatch(r"-?\d+", name) for name in names)


def label_index(row: Row, column: str, labels: Sequence[str], numbered: bool = False) -> int:
    """The index of this row's label in ``labels``.

    A row names its label or, if ``numbered``, may give its index (``false`` is 0, ``true`` is 1).

    Raises:
        ZOError: the label is not one of ``labels``.
    """
    name = read_label(row, column)
    if name in labels:
        return list(labels).index(name)
    number = {"false": "0", "true": "1"}.get(name, name)
    if numbered and number.isdecimal() and int(number) < len(labels) and not any(label.isdecimal() for label in labels):
        return int(number)
    known = ", ".join(repr(label) for label in labels[:8]) + (", …" if len(labels) > 8 else "")
    raise ZOError(f"{row.where}: label {name!r} is not one of the labels of training ({known})")


def sample(rows: Sequence[Row], limit: int | None, seed: int = 0) -> list[Row]:
    """Draw at most ``limit`` rows with ``seed``, in file order; the first ones may all have the same label."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in kept]


def _read_value(row: Row, column: str, option: str) -> Any:
    if column not in row.values:
        has = ", ".join(sorted(map(str, row.values))) or "none"
        raise ZOError(f"{row.where} has no column {column!r} (columns: {has}): name another with {option}")
    value = row.values[column]
    if value is None:
        raise ZOError(f"{row.where}: column {column!r} is null")
    return value


def _describe_type(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- formats ------------------------------------------------------------------------------------------------------


def _decode(path: Path) -> str:
    """Decode a file as UTF-8, without a byte-order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ZOError(f"{path.name} line {line} is not valid UTF-8 (byte 0x{data[error.start]:02x})") from error


def _to_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ZOError(f"{where} is {_describe_type(value)}, not an object with columns")
    return Row(value, where)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not str.splitlines: it also breaks at U+2028 and the like, which valid JSON strings may contain unescaped.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
            raise ZOError(f"{where} is not valid JSON: {reason}") from error
        yield _to_row(value, where)


def _read_json(path: Path) -> Iterator[Row]:
    text = _decode(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ZOError(f"{path.name} line {error.lineno} is not valid JSON: {error.msg}") from error
    for number, value in enumerate(values, start=1):
        yield _to_row(value, f"{path.name} row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # newline="" keeps line breaks inside quoted cells; without it the reader miscounts lines.
    reader = csv.reader(
        io.StringIO(_decode(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                continue
            if len(cells) != len(header):
                raise ZOError(f"{where} has {len(cells)} cells where the header has {len(header)}")
            yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise ZOError(f"{path.name} line {reader.line_num} is not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ZOError("reading Parquet needs pyarrow: pip install 'zowrap[data]'") from error
    try:
        records = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises a dozen types; all mean that the file is not readable Parquet
        raise ZOError(f"{path.name} is not readable as Parquet: {first_line(error)}") from error
    for number, record in enumerate(records, start=1):
        yield Row(record, f"{path.name} row {number}")


def _read_by_content(path: Path) -> Iterator[Row]:
    return _reader_by_content(path)(path)


def _reader_by_content(path: Path) -> Callable[[Path], Iterator[Row]]:
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip()
    except OSError as error:
        raise ZOError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start or start[:1] in (b"{", b"["):  # an empty file has no rows in any format
        return _read_json
    if start[:4] == b"PAR1":
        return _read_parquet
    raise ZOError(f"{path.name}: the format is not known by its name: use .jsonl, .csv, .tsv or .parquet")


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, default_split: str) -> list[Row]:
    match = _HUB_NAME.match(source)
    assert match is not None  # read_rows checked it
    name, split = match["name"], match["split"] or default_split
    try:
        import datasets
    except ImportError as error:
        raise ZOError(
            f"{source} is not a file, and hub data sets need the datasets package: pip install 'zowrap[data]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub raises many types; each becomes one sentence
        reason = first_line(error)
        raise ZOError(
            f"{source} is not a file here, and could not be loaded as a data set from the hub ({reason}): check the "
            "name, and set HF_TOKEN if it is private or gated"
        ) from error
    names = {column: f.names for column, f in (table.features or {}).items() if hasattr(f, "int2str")}
    rows = []
    for number, record in enumerate(table, start=1):
        values = dict(record)
        for column, known in names.items():  # replace the number of a ClassLabel by its name
            if isinstance(values[column], int) and 0 <= values[column] < len(known):
                values[column] = known[values[column]]
        rows.append(Row(values, f"{name}:{split} row {number}"))
    return rows
