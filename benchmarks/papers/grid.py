"""Keep cells in a file, and search for η: a grid on one seed, then the other seeds at its best value.

The search for a (task, rule) starts from the rule's grid of half decades, seed 0. The best η has the lowest loss on
the dev rows, which a few hundred rows measure more finely than the accuracy. If it is at an end of the grid, the
grid grows by half a decade there, at most ``extensions`` times. The other seeds run at the best η; seed 0's run is the
grid's own. Every finished cell is appended at once, so a search that was stopped continues where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.papers.finetune import Cell, Workbench, key_of

Line = dict[str, Any]

# 1, 3, 10, 30, …: half decades, so that neighbours differ by a factor of about three.
_MANTISSAS = (1.0, 3.0)


def half_decade(index: int) -> float:
    """… −1 → 0.3, 0 → 1, 1 → 3, 2 → 10 …, as the decimal number that is written so."""
    decade, third = divmod(index, 2)
    return float(f"{_MANTISSAS[third]:g}e{decade}")


def index_of(lr: float) -> int:
    """The index of the half decade nearest to ``lr``."""
    return round(2 * math.log10(lr))


class CellFile:
    """Holds finished cells, one line of JSON each; without a path only in memory.

    Args:
        key: the key of a line: equal for the same run and for no other.
    """

    def __init__(self, path: Path | None, key: Callable[[Line], str] = key_of) -> None:
        self.path, self.key = path, key
        self.lines: dict[str, Line] = {}
        if path is not None and path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                self.lines[key(line)] = line

    def get(self, cell: Cell) -> Line | None:
        return self.lines.get(cell.key())

    def add(self, line: Line) -> None:
        self.lines[self.key(line)] = line
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


class Unfinished(Exception):
    """A cell is not in the file, and nothing is to be run."""


class Runner:
    """Computes the cells that are missing from the file; the workbench of the latest task stays loaded.

    Args:
        finished_only: run nothing: a missing cell raises :class:`Unfinished`.
    """

    def __init__(
        self,
        file: CellFile,
        data_dir: Path,
        engine: str | None = None,
        say: Callable[[str], None] = print,
        finished_only: bool = False,
    ) -> None:
        self.file, self.data_dir, self.engine, self.say = file, data_dir, engine, say
        self.finished_only = finished_only
        self._bench: tuple[Cell, Workbench] | None = None

    def bench(self, cell: Cell) -> Workbench:
        """The workbench for cells like this one: same task, model, lengths and rows."""
        like = replace(cell, rule="", lr=0.0, seed=0, steps=0, batch_size=0, eps=0.0)
        if self._bench is None or self._bench[0] != like:
            self._bench = None  # two models at once are not needed
            self._bench = (like, Workbench(cell, self.data_dir, self.engine))
        return self._bench[1]

    def line(self, cell: Cell) -> Line:
        """The cell's line, from the file or computed now."""
        found = self.file.get(cell)
        if found is None and self.finished_only:
            raise Unfinished(cell.key())
        if found is None:
            found = self.bench(cell).run(cell)
            self.file.add(found)
            self.say(
                f"{cell.task} {cell.rule} lr {cell.lr:g} seed {cell.seed}: dev loss {_shown(found['dev_loss'])}, "
                f"dev {found['dev_accuracy']:.3f}, test {found['test_accuracy']:.3f}, {found['cpu_seconds']:.0f} s"
            )
        return found


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def best_of(lines: Sequence[Line]) -> Line:
    """The line with the lowest dev loss; a loss that is not finite is the highest."""
    return min(lines, key=lambda line: math.inf if line["dev_loss"] is None else line["dev_loss"])


def search(run: Callable[[Cell], Line], cell: Cell, grid: Sequence[float], extensions: int = 2) -> list[Line]:
    """Seed ``cell.seed`` over the grid, which grows where its best value is at an end.

    Args:
        run: gives the line of a cell.
        cell: all but η.
        grid: half decades, ascending.

    Returns:
        The lines in the order of η.
    """
    lines = [run(replace(cell, lr=lr)) for lr in grid]
    for _ in range(extensions):
        best = best_of(lines)
        if best is lines[0]:
            lines.insert(0, run(replace(cell, lr=half_decade(index_of(lines[0]["lr"]) - 1))))
        elif best is lines[-1]:
            lines.append(run(replace(cell, lr=half_decade(index_of(lines[-1]["lr"]) + 1))))
        else:
            break
    return lines
