"""Update rules. Adding one touches its own file and one line of :data:`REGISTRY`, which feeds the command line's
choices, the documentation's table and the tests' parameter lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zowrap.errors import ZOError, nearest
from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot
from zowrap.rules.conmezo import conmezo
from zowrap.rules.fzoo import fzoo
from zowrap.rules.hizoo import hizoo
from zowrap.rules.lozo import lozo, lozo_m
from zowrap.rules.meazo import meazo
from zowrap.rules.radazo import radazo
from zowrap.rules.sparse_mezo import sparse_mezo
from zowrap.rules.zo_adam import zo_adam
from zowrap.rules.zo_adamm import zo_adamm
from zowrap.rules.zo_rmsprop import zo_rmsprop
from zowrap.rules.zo_sgd import zo_sgd

__all__ = [
    "ALIASES",
    "REGISTRY",
    "Choice",
    "Entry",
    "Probe",
    "Rule",
    "Scalars",
    "Slot",
    "conmezo",
    "fzoo",
    "get",
    "hizoo",
    "lozo",
    "lozo_m",
    "meazo",
    "mezo",
    "radazo",
    "sparse_mezo",
    "zo_adam",
    "zo_adamm",
    "zo_rmsprop",
    "zo_sgd",
]

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
    "zo_rmsprop": Entry(zo_rmsprop, "1910.06513", "1", "2q", True),
    "zo_adam": Entry(zo_adam, "1910.06513", "2", "2q", True),
    "zo_adamm": Entry(zo_adamm, "1910.06513", "3 (amsgrad=False: 2)", "2q", True),
    "radazo": Entry(radazo, "2502.01014", "2", "2q", True),
    "meazo": Entry(meazo, "2605.03869", "0", "2q", True),
    "conmezo": Entry(conmezo, "2511.02757", "1", "2q", False),
    "lozo": Entry(lozo, "2410.07698", "0", "2q", False),
    "lozo_m": Entry(lozo_m, "2410.07698", "0 (r columns per matrix)", "2q", False),
    "sparse_mezo": Entry(sparse_mezo, "2402.15751", "0", "2q", False),
    "fzoo": Entry(fzoo, "2506.09034", "0", "q + 1", True),
    "hizoo": Entry(hizoo, "2402.15173", "1", "2q + 1", False),
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
