"""Two kinds of failure: the user's input, or our bug.

``ZOError`` is raised for everything a user can mend (a wrong option, a missing file, a model that cannot be
used as asked). Its message is one sentence in the user's own words; the command line prints it and exits with
code 2. ``ZOInternalError`` is raised when one of our own invariants is broken; the command line exits with 1.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_NO_VALUE = object()


class Option(NamedTuple):
    """An option that a message names. Python and the command line write it differently, so the message keeps it apart.

    Attributes:
        name: as in Python.
        value: the value that the message names with it, if any.
        rule: the rule that has this hyper-parameter; empty for an option of a step.
        python: Python's spelling where it is not ``name`` or ``name=value``.
    """

    name: str
    value: Any = _NO_VALUE
    rule: str = ""
    python: str = ""

    @property
    def has_value(self) -> bool:
        return self.value is not _NO_VALUE

    def __str__(self) -> str:
        if self.python:
            return self.python
        name = f"{self.rule}: {self.name}" if self.rule else self.name
        return f"{name}={self.value!r}" if self.has_value else name


class ZOError(ValueError):
    """The user can mend this: the message says in one sentence what happened and what to do.

    Args:
        parts: the message in pieces, each text or an :class:`Option`; joined without anything in between.
    """

    def __init__(self, *parts: str | Option) -> None:
        super().__init__("".join(map(str, parts)))
        self.parts = parts

    def reworded(self, spell: Callable[[Option], str]) -> ZOError:
        """The same error with its options spelled by ``spell``."""
        return type(self)("".join(part if isinstance(part, str) else spell(part) for part in self.parts))


class ZOCaptureError(ZOError):
    """The model's loss could not be captured or compiled; the eager engine can still run it."""


class ZOInternalError(RuntimeError):
    """One of our invariants is broken: please report it."""


class ZOWarning(UserWarning):
    """Something the user should know: what was ignored, or what runs more slowly and why."""


def first_line(error: object, otherwise: str | None = None) -> str:
    """The first line with a word in it of what another library raised; ``otherwise``, or its class, where none has."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__ if otherwise is None else otherwise)


def list_some(names: Iterable[str], most: int = 8) -> str:
    """The first names of a list that may be long, for a message: ``a, b, …``."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def nearest(name: str, choices: Iterable[str]) -> str:
    """A clause naming the closest valid choice, e.g. ``"; did you mean 'meazo'?"`` (or the list of choices)."""
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose one of {', '.join(sorted(choices))}"


# What needs a package, as the start of a sentence, and what pip installs it by.
_NEEDED = {
    "bitsandbytes": ("8-bit and 4-bit weights need", "bitsandbytes"),
    "peft": ("adapters need", "'zowrap[peft]'"),
}


def need_package(name: str, what: str | None = None) -> None:
    """Raise :class:`ZOError` where bitsandbytes or peft is not installed; ``what`` starts another sentence."""
    if importlib.util.find_spec(name) is None:
        usual, install = _NEEDED[name]
        raise ZOError(f"{what or usual} {name}, which is not installed: pip install {install}")


def not_finite(losses: Tensor) -> ZOError:
    """The error of a run whose first losses are not finite."""
    told = ", ".join(f"{value:g}" for value in losses.reshape(-1).tolist()[:4])
    return ZOError(
        f"the loss is not finite from the start (it is {told}): check the data and the labels, and whether the "
        "model's own loss is finite; for a 16-bit model try dtype float32 or bfloat16"
    )
