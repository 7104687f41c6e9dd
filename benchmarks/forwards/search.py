"""Make the runs of a task that are missing: the grid of each method on seed 0, then the other seeds at its best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.forwards.methods import METHODS, Method, find
from benchmarks.forwards.runs import TASKS, Bench, Run
from benchmarks.papers.grid import CellFile, half_decade, index_of

Line = dict[str, Any]
SEEDS = (0, 1, 2)
EXTENSIONS = 2  # half decades that a grid may grow by, where its best value is at an end


def finished(path: Path) -> CellFile:
    """The file of finished runs."""
    return CellFile(path, lambda line: Run(**{name: line[name] for name in Run.__dataclass_fields__}).key())


class OutOfTime(Exception):
    """The time that was given is over."""


class Search:
    """Runs of one task.

    Args:
        until: on the clock of :func:`time.monotonic`, no run is begun after it.
        make_bench: loads the model, when the first run is made.
    """

    def __init__(
        self,
        task: str,
        file: CellFile,
        make_bench: Callable[[], Bench],
        until: float,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task, self.file, self.until, self.say = task, file, until, say
        self._make_bench = make_bench
        self._bench: Bench | None = None

    def make(self, methods: Iterable[str] = tuple(METHODS)) -> None:
        """Make what is missing of these methods.

        Raises:
            OutOfTime: before all were made.
        """
        for name in methods:
            best = self.best(name, self.line)
            for seed in SEEDS:
                self.line(replace(best, seed=seed))

    def best(self, name: str, line_of: Callable[[Run], Line]) -> Run:
        """The setting of a method with the lowest dev loss at the end of seed 0."""
        method = find(name)
        runs: list[Run] = []
        for batch_size in method.batches:
            runs += self._grid(name, method, batch_size, line_of)
        return min(runs, key=lambda run: final_loss(line_of(run)))

    def _grid(self, name: str, method: Method, batch_size: int, line_of: Callable[[Run], Line]) -> list[Run]:
        first = Run(self.task, name, None, batch_size, 0, round(method.budget * TASKS[self.task].forwards))
        if not method.lrs:
            return [first]
        runs = [replace(first, lr=lr) for lr in method.lrs]
        for _ in range(EXTENSIONS):
            losses = [final_loss(line_of(run)) for run in runs]
            at = losses.index(min(losses))
            if at == 0:
                runs.insert(0, replace(first, lr=half_decade(index_of(float(runs[0].lr or 1)) - 1)))
            elif at == len(runs) - 1:
                runs.append(replace(first, lr=half_decade(index_of(float(runs[-1].lr or 1)) + 1)))
            else:
                break
        for run in runs:
            line_of(run)
        return runs

    def line(self, run: Run) -> Line:
        """The line of a run, made now where it is missing."""
        found = self.file.lines.get(run.key())
        if found is not None:
            return found
        if time.monotonic() > self.until:
            raise OutOfTime
        self._bench = self._bench or self._make_bench()
        began = time.monotonic()
        found = self._bench.make(run)
        self.file.add(found)
        last = found["curve"][-1]
        self.say(
            f"{run.task} {run.method} lr {found['chosen_lr']:.2g} batch {run.batch_size} seed {run.seed}: "
            f"{last['forwards']:.0f} forwards, dev loss {last['loss']}, accuracy {last['accuracy']}, "
            f"{time.monotonic() - began:.0f} s"
        )
        return found


def final_loss(line: Line) -> float:
    """Dev loss at the end; infinite where a run diverged."""
    last = line["curve"][-1]
    return math.inf if last["loss"] is None or last["forwards"] < 0.9 * line["forwards"] else float(last["loss"])
