"""Update rules. Adding one touches its own file and one line of :data:`REGISTRY`, which feeds the command line's
choices, the documentation's table and the tests' parameter lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zowrap.errors import ZOError, nearest
from zowrap.rules.base import Probe, Rule, Scalars, Slot
from zowrap.rules.meazo import meazo
from zowrap.rules.zo_sgd import zo_sgd

__all__ = ["ALIASES", "REGISTRY", "Entry", "Probe", "Rule", "Scalars", "Slot", "get", "meazo", "mezo", "zo_sgd"]

mezo = zo_sgd


@dataclass(frozen=True)
class Entry:
    """One line of the table of rules.

    Attributes:
        constructor: keyword arguments only, all with defaults; returns a :class:`Rule`.
        paper: arXiv number.
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
        """First line of the constructor's docstring."""
        return (inspect.getdoc(self.constructor) or "").split("\n")[0]

    def defaults(self) -> dict[str, Any]:
        """Keyword arguments and their defaults."""
        return {n: p.default for n, p in inspect.signature(self.constructor).parameters.items()}


REGISTRY: dict[str, Entry] = {
    "zo_sgd": Entry(zo_sgd, "2305.17333", "0 (momentum: 1)", "2q", False),
    "meazo": Entry(meazo, "2605.03869", "0", "2q", True),
}
ALIASES = {"mezo": "zo_sgd"}


def get(rule: str | Rule, **hyper: Any) -> Rule:
    """The rule of that name with its defaults and ``hyper`` over them; a :class:`Rule` passes through.

    Raises:
        ZOError: unknown name, or a hyper-parameter that the rule does not have or that is out of range.
    """
    if isinstance(rule, Rule):
        if hyper:
            raise ZOError(f"{rule.name} is already built: give {', '.join(hyper)} to its constructor")
        return rule
    if not isinstance(rule, str):
        raise ZOError(f"rule is a name or a rule of zowrap.rules, got {type(rule).__name__}")
    name = ALIASES.get(rule, rule)
    if name not in REGISTRY:
        raise ZOError(f"unknown rule {rule!r}{nearest(rule, [*REGISTRY, *ALIASES])}")
    entry = REGISTRY[name]
    known = entry.defaults()
    for key in hyper:
        if key not in known:
            raise ZOError(f"{name} has no hyper-parameter {key!r}{nearest(key, known)}")
    return entry.constructor(**hyper)
