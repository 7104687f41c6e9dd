"""The journal of a run: one line of JSON per step, enough to make the trained weights again from the base model.

The first line identifies the run (seed, rule, options, what moves); every other line is the record of one step: its
number, losses, projected gradients and hyper-parameters. A step's noise follows from seed and step, so these few
numbers determine the whole update. Steps are only ever appended, each in one write: a kill can tear the last line at
most, and a torn line is ignored and cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zowrap.errors import ZOError
from zowrap.step.options import IDENTITY
from zowrap.step.parameters import hash_shapes_and_dtypes
from zowrap.storage.atomic import to_jsonable, write_text
from zowrap.storage.lines import Lines
from zowrap.training.environment import describe_environment

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel

VERSION = 1


class Journal(Lines):
    """The journal of one run; made by :meth:`start` or :meth:`resume`.

    Attributes:
        header: the first line.
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any]) -> None:
        super().__init__(path)
        self.header = header

    @classmethod
    def start(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Journal:
        """Begin a journal with no step in it; it replaces one of that name."""
        header = to_jsonable(header)
        write_text(path, json.dumps(header) + "\n")
        return cls(path, header)

    def amend_header(self, **facts: Any) -> None:
        """Add facts to the header of a journal that holds no step yet."""
        self.close()
        self.header = to_jsonable({**self.header, **facts})
        write_text(self.path, json.dumps(self.header) + "\n")

    @classmethod
    def read_from(cls, path: str | os.PathLike[str]) -> Journal | None:
        """Open the journal at ``path``; ``None`` where there is none, or not even a whole first line.

        Raises:
            ZOError: the file is something else.
        """
        first = next(Lines(path).read(), None)
        if first is None:
            return None
        if first[2].get("journal") != VERSION:
            raise ZOError(f"{path} is not a journal that this version of zowrap reads")
        return cls(path, first[2])

    @classmethod
    def resume(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Journal | None:
        """Open the journal at ``path``, if there is one, and check that it is of the run that ``header`` describes.

        Raises:
            ZOError: it is of another run; the message names the first difference.
        """
        journal = cls.read_from(path)
        if journal is not None:
            difference = compare(journal.header, to_jsonable(header))
            if difference:
                raise ZOError(f"{path} is the journal of another run: {difference}")
        return journal

    def records(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the records of the steps from number ``after`` on (a step's number counts those before it).

        Raises:
            ZOError: a step is missing.
        """
        expected = after
        for record in self.entries():
            if record["step"] < after:
                continue
            if record["step"] != expected:
                raise ZOError(f"{self.path} has no record of step {expected}: the next one is {record['step']}")
            expected += 1
            yield record

    def steps(self) -> int:
        """Count the steps that the journal reaches: one more than the last record's number."""
        return max((record["step"] for record in self.entries()), default=-1) + 1

    def keep(self, steps: int) -> None:
        """Cut off a torn line and the records of every step from number ``steps`` on."""
        end = 0
        for start, stop, value in self.read():
            if value.get("step", -1) >= steps:
                self.cut(start)
                return
            end = stop
        self.cut(end)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield every record, whether or not they are consecutive (after a lost journal they are not)."""
        lines = self.read()
        next(lines, None)
        for number, (_, _, record) in enumerate(lines, 2):
            if not isinstance(record.get("step"), int) or not isinstance(record.get("losses"), list):
                raise ZOError(f"{self.path}, line {number}, is not the record of a step")
            # A loss that was not finite is null in JSON; replayed, the step is skipped again.
            for name in ("loss", "losses", "projected_grad", "weights"):
                if name in record:
                    record[name] = _with_nan(record[name])
            yield record


def _with_nan(value: Any) -> Any:
    """Undo :func:`zowrap.storage.atomic.to_jsonable`: null becomes NaN again."""
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


# --- the identity of a run ----------------------------------------------------------------------------------------

_SAME = ("rule", "hyper", *(name for name in IDENTITY if name != "rule"), "parameters_hash")


def describe(zm: ZOModel, *, model_name: str | None = None) -> dict[str, Any]:
    """Make the header of a new run's journal."""
    return {
        "journal": VERSION,
        "model": model_name,
        **{name: getattr(zm.options, name) for name in IDENTITY},
        "rule": zm.rule.name,
        "hyper": dict(zm.rule.hyper),
        "direction": zm.job.direction.name,
        "seed": zm.seed,
        "parameters_hash": hash_shapes_and_dtypes(zm.parameters),
        "environment": describe_environment(zm),
        "weights": fingerprint(zm),
        "parameters": [parameter.name for parameter in zm.parameters],
    }


def fingerprint(zm: ZOModel, samples: int = 64) -> str:
    """Hash at most ``samples`` evenly spaced elements of each tunable tensor: this tells base models apart."""
    digest = hashlib.sha256()
    for parameter in zm.parameters:
        flat = parameter.tensor.detach().reshape(-1)
        for each in [flat] if parameter.scale is None else [flat, parameter.scale.detach().reshape(-1)]:
            picked = each[:: max(1, each.numel() // samples)][:samples]
            digest.update(picked.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Return the first difference between two headers, as a clause; ``None`` when they are of the same run."""
    for name in _SAME:
        if theirs.get(name) != ours.get(name):
            if name == "parameters_hash":
                return _parameters_difference(theirs.get("parameters", []), ours["parameters"])
            return f"it was written with {name}={theirs.get(name)!r}, this run has {ours.get(name)!r}"
    return None


def _parameters_difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    missing = [name for name in theirs if name not in set(ours)]
    added = [name for name in ours if name not in set(theirs)]
    if missing:
        return f"there {missing[0]} moves, here it does not"
    if added:
        return f"here {added[0]} moves, there it does not"
    return "the parameters that move have other shapes or dtypes"
