"""Append JSON objects to a file, one per line, and read them back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.storage.atomic import guard_write, to_jsonable


class Lines:
    """An append-only file of JSON objects, one per line.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: int | None = None

    def append(self, *values: dict[str, Any]) -> None:
        """Append objects in one system call; once it returns, killing the process cannot lose them.

        Raises:
            ZOError: the disk is full; nothing is appended then.
        """
        text = "".join(json.dumps(to_jsonable(value)) + "\n" for value in values)
        if not text:
            return
        data = text.encode()
        with guard_write(self.path):
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, data)
                while written < len(data):  # a nearly full disk accepts a part, then fails
                    written += os.write(self._file, data[written:])
            except OSError:
                self.cut(size)
                raise

    def read(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield (first byte, byte after the last, object) for every complete line.

        Raises:
            ZOError: a line other than the last is not a JSON object.
        """
        if not self.path.exists():
            return
        start = 0
        damaged: int | None = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if damaged is not None:
                    raise ZOError(f"{self.path}, line {damaged}, is damaged: it is not a JSON object")
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    yield start, start + len(line), value
                else:
                    damaged = number  # if it is the last line, the process was killed while writing it
                start += len(line)

    def cut(self, offset: int) -> None:
        """Truncate the file to ``offset`` bytes."""
        self.close()
        if self.path.is_file() and self.path.stat().st_size > offset:
            os.truncate(self.path, offset)

    def sync(self) -> None:
        """Flush the lines to disk."""
        if self._file is not None:
            with guard_write(self.path):
                os.fsync(self._file)

    def close(self) -> None:
        """Close the file; the next :meth:`append` opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
