"""Write files atomically: each one is written beside its target and then renamed into place.

A reader never sees a partial file, and a full disk leaves the previous file intact. Names ending in ``.tmp`` belong to
the writer: readers ignore them, and the next writer removes any that a killed process left behind.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError

TMP = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def guard_write(path: str | os.PathLike[str], *leftovers: str | os.PathLike[str]) -> Iterator[None]:
    """Guard a write of ``path``: on failure, remove ``leftovers`` and raise an error that a user understands.

    Raises:
        ZOError: the disk is full, or the path cannot be written. Other errors pass through.
    """
    try:
        yield
    except BaseException as error:
        for leftover in leftovers:
            remove(leftover)
        sentence = _explain(error, path)
        if sentence is None:
            raise
        raise ZOError(sentence) from error


def _explain(error: BaseException, path: str | os.PathLike[str]) -> str | None:
    # safetensors and tokenizers are written in Rust and report the system's error number only in their message.
    if "(os error 28)" in str(error) or (isinstance(error, OSError) and error.errno in _FULL):
        return f"the disk is full: {os.fspath(path)} was not written, and its previous contents are unchanged"
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return f"{os.fspath(path)} cannot be written: {os.strerror(error.errno or 0).lower()}"
    return None


def contains(folder: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether ``other`` is the folder or is inside it, with links resolved."""
    return is_same_place(folder, other) or Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder))


def is_same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths name the same file or folder, with links resolved; it need not exist yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a directory tree if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) atomically."""
    path = Path(path)
    beside = path.with_name(path.name + TMP)
    with guard_write(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the JSON value in ``path``.

    Raises:
        ZOError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ZOError(f"{os.fspath(path)} cannot be read: {os.strerror(error.errno or 0).lower()}") from None
    except ValueError as error:
        raise ZOError(f"{os.fspath(path)} is not valid JSON: {error}") from None


def to_jsonable(value: Any) -> Any:
    """Convert ``value`` to JSON types: non-finite numbers become null, unknown objects their name."""
    if isinstance(value, bool | int | str) or value is None:
        return str(value) if type(value) not in (bool, int, str, type(None)) and isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch numbers
        return to_jsonable(value.tolist())
    return getattr(value, "__name__", None) or str(value)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file's contents to disk, so that a later rename never leaves an empty file under the new name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def move_into(source: Path, target: Path) -> None:
    """Rename every file below ``source`` into ``target``, weights first and JSON files last, and remove ``source``.

    A reader of ``target`` meanwhile finds either the old or the new file of a name, never a partial one.
    """
    entries = sorted(source.rglob("*"), key=lambda p: (p.suffix == ".json", p.name))
    for entry in entries:
        if entry.is_file():
            place = target / entry.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(entry)
            os.replace(entry, place)
    remove(source)
