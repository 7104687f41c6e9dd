"""Define :class:`Entry`, one line of the registry of rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zowrap.rules.base import Rule


@dataclass(frozen=True)
class Entry:
    """One line of the registry of rules.

    Attributes:
        constructor: keyword arguments only, all with defaults; returns a :class:`Rule`.
        paper: arXiv number; for a rule registered from elsewhere, any source.
        memory: state in units of the tunable parameters (float32).
        forwards: forward passes per step, in terms of q queries.
        scale_free: whether multiplying the loss by a constant leaves the step unchanged.
    """

    constructor: Callable[..., Rule]
    paper: str
    memory: str
    forwards: str
    scale_free: bool

    def summary(self) -> str:
        """The first line of the constructor's docstring."""
        return (inspect.getdoc(self.constructor) or "").split("\n")[0]

    def defaults(self) -> dict[str, Any]:
        """The constructor's keyword arguments and their defaults."""
        return {n: p.default for n, p in inspect.signature(self.constructor).parameters.items()}
