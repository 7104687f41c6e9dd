"""Files that are whole or absent: every write goes beside its target and is renamed into place.

A reader never sees half a file, and a full disk leaves what was there before. Names ending in ``.tmp`` are the
writer's own: readers ignore them, and the next writer removes what a kill left behind.
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
def writing(path: str | os.PathLike[str], *leftovers: str | os.PathLike[str]) -> Iterator[None]:
    """Around a write of ``path``: a failure removes ``leftovers`` and is told in one sentence.

    Raises:
        ZOError: the disk is full, or the place cannot be written.
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
    # safetensors and tokenizers, written in Rust, report the system's error number only in their text.
    if "(os error 28)" in str(error) or (isinstance(error, OSError) and error.errno in _FULL):
        return f"the disk is full: {os.fspath(path)} was not written; what was there before is untouched"
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return f"{os.fspath(path)} cannot be written: {os.strerror(error.errno or 0).lower()}"
    return None


def holds(folder: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether ``other`` is the folder, or lies in it, by whatever names."""
    return same_place(folder, other) or Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder))


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file or folder, by whatever links and detours; also where it is not there yet."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a directory tree if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one move."""
    path = Path(path)
    beside = path.with_name(path.name + TMP)
    with writing(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in ``path``.

    Raises:
        ZOError: it is not there, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ZOError(f"{os.fspath(path)} cannot be read: {os.strerror(error.errno or 0).lower()}") from None
    except ValueError as error:
        raise ZOError(f"{os.fspath(path)} is not valid JSON: {error}") from None


def jsonable(value: Any) -> Any:
    """``value`` with what JSON lacks replaced: non-finite numbers by null, unknown objects by their name."""
    if isinstance(value, bool | int | str) or value is None:
        return str(value) if type(value) not in (bool, int, str, type(None)) and isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch numbers
        return jsonable(value.tolist())
    return getattr(value, "__name__", None) or str(value)


def sync(path: str | os.PathLike[str]) -> None:
    """Have the system put a file's contents on the disk, so that a rename after it never names an empty file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def move_into(source: Path, target: Path) -> None:
    """Rename every file of ``source`` (one level of folders deep) into ``target``, weights first, indices last.

    A reader that opens ``target`` meanwhile finds either file of a name, never half of one.
    """
    entries = sorted(source.rglob("*"), key=lambda p: (p.suffix == ".json", p.name))
    for entry in entries:
        if entry.is_file():
            place = target / entry.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(entry)
            os.replace(entry, place)
    remove(source)
