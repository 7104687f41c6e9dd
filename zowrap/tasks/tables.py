"""Read CSV and TSV text row by row, and notice quotation marks that would swallow rows.

A CSV quotes as the ``csv`` module does. A TSV needs no quotes, but pandas and spreadsheets write them, so a cell in
balanced quotation marks is unquoted there, too. A quotation mark that opens a cell and closes none is part of the text
of a TSV, and an error in a CSV.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from zowrap.errors import ZOError

log = logging.getLogger("zowrap")

_BYTE_ORDER_MARK = "\ufeff"


@dataclass
class Table:
    """A table in text, each line of which is a row unless a quoted cell runs over several lines.

    Attributes:
        text: the content of the file, with its own line ends.
        name: the file's name, for messages.
        tabs: the cells are separated by tabs unless the header says otherwise.
    """

    text: str
    name: str
    tabs: bool
    _lines: list[str] = field(init=False)
    _delimiter: str = field(init=False)
    _header: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        # newline="" keeps the line breaks inside quoted cells as they are.
        lines = io.StringIO(self.text, newline="").readlines()
        self._lines = [line.removeprefix(_BYTE_ORDER_MARK) for line in lines]  # of files put together as well
        self._delimiter = self._find_delimiter()

    def rows(self) -> Iterator[tuple[dict[str, str], str]]:
        """Yield each row as (cells by column, place). Quotation marks that are read in an unusual way are logged.

        Raises:
            ZOError: a line cannot be read, has too few or too many cells or repeats the header, or two columns have
                one name.
        """
        plain: list[int] = []  # lines whose quotation marks are taken as text
        long: list[tuple[int, int]] = []  # first and last line of rows that could be several
        start = 0
        while start < len(self._lines):
            number = start + 1
            where = f"{self.name} line {number}"
            try:
                cells, count = self._read_record(start)
                several = count > 1 and self._could_be_rows(start, count)
            except csv.Error as error:
                if self._delimiter != "\t":
                    raise ZOError(f"{where} is not valid CSV: {_explain(error)}") from error
                cells, count, several = self._split(start), 1, False
                plain.append(number)
            if several and self._delimiter == "\t":
                cells, count = self._split(start), 1
                plain.append(number)
            elif several:
                long.append((number, number + count - 1))
            start += count
            if not cells:
                continue
            if not self._header:
                self._header = self._check_header([name.strip() for name in cells], where)
                continue
            if len(cells) != len(self._header):
                raise ZOError(f"{where} has {len(cells)} cells where the header has {len(self._header)}")
            if len(cells) > 1 and [cell.strip() for cell in cells] == self._header:
                raise ZOError(f"{where} repeats the header: if two files were put together, remove this line")
            yield dict(zip(self._header, cells, strict=True)), where
        self._tell(plain, long)

    def _find_delimiter(self) -> str:
        """The separator of the header: the usual one of the format, or another where the header has only that."""
        header = next((line for line in self._lines if line.strip()), "")
        usual = "\t" if self.tabs else ","
        found = next((each for each in (usual, *",;\t") if each in header), usual)
        if found != usual:
            log.info("%s has its cells separated by %s", self.name, "tabs" if found == "\t" else repr(found))
        return found

    def _read_record(self, start: int) -> tuple[list[str], int]:
        """Read the row that begins at a line. Returns its cells, none for a blank line, and the number of lines."""
        line = self._lines[start]
        if not line.strip("\r\n"):
            return [], 1
        if '"' not in line:
            return self._split(start), 1
        lines = (self._lines[i] for i in range(start, len(self._lines)))
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        return next(reader), reader.line_num

    def _split(self, number: int) -> list[str]:
        """The cells of a line whose quotation marks are text."""
        return self._lines[number].rstrip("\r\n").split(self._delimiter)

    def _could_be_rows(self, start: int, count: int) -> bool:
        """Whether each line of a row would be a row by itself, without an empty cell."""
        lines = map(self._split, range(start, start + count))
        return bool(self._header) and all(len(cells) == len(self._header) and all(cells) for cells in lines)

    def _check_header(self, names: list[str], where: str) -> list[str]:
        seen: dict[str, int] = {}
        for number, name in enumerate(names, start=1):
            if name and name in seen:
                raise ZOError(f"{where} names the column {name!r} twice ({seen[name]} and {number}): rename one")
            seen[name] = number
        return names

    def _tell(self, plain: Sequence[int], long: Sequence[tuple[int, int]]) -> None:
        if plain:
            log.warning(
                "%s: %d %s a quotation mark that encloses no cell and is read as text (first: line %d)",
                self.name,
                len(plain),
                "row has" if len(plain) == 1 else "rows have",
                plain[0],
            )
        if long:
            log.warning(
                "%s: %d quoted %s over several lines, each of which looks like a row of its own (first: lines %d to "
                "%d): if a quotation mark there is a stray one, rows are lost",
                self.name,
                len(long),
                "cell runs" if len(long) == 1 else "cells run",
                *long[0],
            )


def _explain(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quotation mark opens a cell there and is never closed"
    return f"{error} (a quotation mark inside a quoted cell is written twice)" if '"' in str(error) else str(error)
