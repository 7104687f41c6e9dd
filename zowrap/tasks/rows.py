"""Read labelled or plain text from JSON lines, JSON, CSV or Parquet files, or from a data set on the Hugging Face hub.

A file becomes :class:`Rows`, each of which knows its place, so that every error about its contents names the file and
the line. Nothing here needs a tokenizer or a model: a command reads and checks its data before it loads anything large.
The same rows are the same in every format; :mod:`zowrap.tasks.labels` reads their labels.
"""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError, first_line
from zowrap.tasks.tables import Table

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


class Rows(list[Row]):
    """The rows of a file.

    Attributes:
        classes: column → the names of its classes in the order of their numbers, where the file holds them (a
            ``ClassLabel`` of datasets). The rows then hold names.
    """

    def __init__(self, rows: Iterable[Row] = (), classes: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(rows)
        self.classes = dict(classes or {})


def read_rows(source: str, default_split: str = "train") -> Rows:
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
            read = _READERS.get(path.suffix.lower(), _read_by_content)(path)
            found = read if isinstance(read, Rows) else Rows(read)
        except OSError as error:
            raise ZOError(f"{source} cannot be read: {error.strerror or error}") from error
    else:
        found = _read_hub(source, default_split)
    if not found:
        raise ZOError(f"{source} is empty: it has no rows")
    return Rows((Row(row.values, row.where, index) for index, row in enumerate(found)), found.classes)


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
        row = next(iter(reader(path)), None)
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
    value = read_value(row, column, option)
    if not isinstance(value, str):
        raise ZOError(f"{row.where}: column {column!r} is {describe_type(value)}, not text")
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


def sample(rows: Sequence[Row], limit: int | None, seed: int = 0) -> Rows:
    """Draw at most ``limit`` rows with ``seed``, in file order; the first ones may all have the same label."""
    classes = getattr(rows, "classes", None)
    if limit is None or len(rows) <= limit:
        return Rows(rows, classes)
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return Rows((rows[i] for i in kept), classes)


def read_value(row: Row, column: str, option: str) -> Any:
    """Read the value in ``column``.

    Raises:
        ZOError: the column is missing or null; the message names ``option``, which names the column.
    """
    if column not in row.values:
        has = ", ".join(sorted(map(str, row.values))) or "none"
        raise ZOError(f"{row.where} has no column {column!r} (columns: {has}): name another with {option}")
    value = row.values[column]
    if value is None:
        raise ZOError(f"{row.where}: column {column!r} is null")
    return value


def describe_type(value: Any) -> str:
    """Describe a value by its type; a number is named."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


# --- formats ------------------------------------------------------------------------------------------------------


# In this order: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


def _decode(path: Path) -> str:
    """Decode a file as UTF-8, or as its byte-order mark says, and leave the mark out."""
    data = path.read_bytes()
    codec, encoding = _read_mark(data)
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(codec, "ignore").count("\n") + 1
        raise ZOError(f"{path.name} line {line} is not valid {encoding} (byte 0x{data[error.start]:02x})") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ZOError(f"{path.name} line {line} holds a zero byte, so it is not text in UTF-8: save it as UTF-8")
    return text


def _read_mark(data: bytes) -> tuple[str, str]:
    """The codec that the byte-order mark of a file asks for, and the encoding's name; UTF-8 without a mark."""
    return next(((codec, name) for mark, codec, name in _MARKS if data.startswith(mark)), ("utf-8", "UTF-8"))


def _to_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ZOError(f"{where} is {describe_type(value)}, not an object with columns")
    return Row(value, where)


class _NamedTwiceError(Exception):
    """A JSON object has a name twice; ``json.loads`` would keep the last value in silence."""


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NamedTwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not str.splitlines: it also breaks at U+2028 and the like, which valid JSON strings may contain unescaped.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # files that were put together have a mark within
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_to_object)
        except _NamedTwiceError as error:
            raise ZOError(f"{where} names {str(error)!r} twice: rename one") from error
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
        values = json.loads(text, object_pairs_hook=_to_object)
    except _NamedTwiceError as error:
        raise ZOError(f"{path.name} names {str(error)!r} twice in one row: rename one") from error
    except json.JSONDecodeError as error:
        raise ZOError(f"{path.name} line {error.lineno} is not valid JSON: {error.msg}") from error
    for number, value in enumerate(values, start=1):
        yield _to_row(value, f"{path.name} row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    for values, where in Table(_decode(path), path.name, tabs=path.suffix.lower() == ".tsv").rows():
        yield Row(values, where)


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ZOError("reading Parquet needs pyarrow: pip install 'zowrap[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except Exception as error:  # pyarrow raises a dozen types; all mean that the file is not readable Parquet
        raise ZOError(f"{path.name} is not readable as Parquet: {first_line(error)}") from error
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ZOError(f"{path.name} has two columns named {twice!r}: rename one")
    return _name_classes(table.to_pylist(), _read_class_names(table.schema.metadata or {}), f"{path.name} row")


def _read_class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes by column, which datasets keeps in the metadata of a Parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: feature.get("names") for column, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):  # of another writer
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }


def _name_classes(records: Iterable[Mapping[str, Any]], classes: Mapping[str, Sequence[str]], place: str) -> Rows:
    """Make rows of records and replace the numbers of classes by their names; -1, "no label", has none and stays."""
    rows = []
    for number, record in enumerate(records, start=1):
        values = dict(record)
        for column, known in classes.items():
            value = values.get(column)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(known):
                values[column] = known[value]
        rows.append(Row(values, f"{place} {number}"))
    return Rows(rows, classes)


def _read_by_content(path: Path) -> Iterable[Row]:
    return _reader_by_content(path)(path)


def _reader_by_content(path: Path) -> Callable[[Path], Iterable[Row]]:
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise ZOError(f"{path} cannot be read: {error.strerror or error}") from error
    text = start.decode(_read_mark(start)[0], "ignore").lstrip()
    if not text or text[0] in "{[":  # an empty file has no rows in any format
        return _read_json
    if start[:4] == b"PAR1":
        return _read_parquet
    raise ZOError(f"{path.name}: the format is not known by its name: use .jsonl, .csv, .tsv or .parquet")


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, default_split: str) -> Rows:
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
    classes = {column: f.names for column, f in (table.features or {}).items() if hasattr(f, "int2str")}
    return _name_classes(table, classes, f"{name}:{split} row")
