"""Update rules. Adding one touches its own file, its import here and one line of :data:`zowrap.names.RULES`, from which
:data:`REGISTRY` is made: it feeds the command line's choices, the documentation's table and the tests' parameter lists.
A rule from elsewhere joins by :func:`register`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from zowrap import names
from zowrap.errors import (
    ZOError,
    ZOWarning,
    nearest,
)
from zowrap.rules import entry_points, validation
from zowrap.rules.base import Rule
from zowrap.rules.conmezo import conmezo  # noqa: F401 (looked up by name)
from zowrap.rules.entry import Entry
from zowrap.rules.fzoo import fzoo  # noqa: F401 (looked up by name)
from zowrap.rules.hizoo import hizoo  # noqa: F401 (looked up by name)
from zowrap.rules.lozo import (
    lozo,  # noqa: F401 (looked up by name)
    lozo_m,  # noqa: F401 (looked up by name)
)
from zowrap.rules.meazo import meazo  # noqa: F401 (looked up by name)
from zowrap.rules.radazo import radazo  # noqa: F401 (looked up by name)
from zowrap.rules.sparse_mezo import sparse_mezo  # noqa: F401 (looked up by name)
from zowrap.rules.zo_adam import zo_adam  # noqa: F401 (looked up by name)
from zowrap.rules.zo_adamm import zo_adamm  # noqa: F401 (looked up by name)
from zowrap.rules.zo_rmsprop import zo_rmsprop  # noqa: F401 (looked up by name)
from zowrap.rules.zo_sgd import zo_sgd

mezo = zo_sgd


REGISTRY: dict[str, Entry] = {name: Entry(globals()[name], *line) for name, line in names.RULES.items()}
ALIASES = names.RULE_ALIASES


def register(name: str, constructor: Callable[..., Rule], *, paper: str, scale_free: bool = False) -> None:
    """Add a rule from elsewhere to :data:`REGISTRY`: every command, ``zo_wrap`` and the trainer know it from then on.

    Registering the same constructor again, a reloaded module's for example, replaces it. How much state the rule keeps
    and how many forwards a step takes are read off the rule itself.

    Args:
        name: what users write, ``my_rule``; also the name of the :class:`Rule` that the constructor returns.
        constructor: keyword arguments only, all with defaults, ``lr`` among them; the first line of its docstring is
            what ``zowrap rules`` prints. Called without arguments it must return a rule whose ``hyper`` holds the
            value of every other keyword, plain enough for JSON: a journal records them and builds the rule again.
        paper: where the rule is from: an arXiv number, a title, your own name.
        scale_free: whether multiplying the loss by a constant leaves the step unchanged.

    Raises:
        ZOError: the name is taken, or the constructor is not as above; nothing is registered then.
    """
    validation.check_name(name, REGISTRY, ALIASES, constructor)
    rule = validation.check_constructor(name, constructor)
    if not isinstance(paper, str) or not paper.strip():
        raise ZOError(f"{name} cannot be registered: paper must say where the rule is from, got {paper!r}")
    REGISTRY[name] = Entry(constructor, paper, validation.memory(rule), validation.forwards(rule), bool(scale_free))


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
    entry = find(rule)
    name = ALIASES.get(rule, rule)
    known = entry.defaults()
    for key in hyper:
        if key not in known:
            raise ZOError(f"{name} has no hyper-parameter {key!r}{nearest(key, known)}")
    return entry.constructor(**hyper)


def find(name: str) -> Entry:
    """The registered rule of that name or alias; installed packages are asked for one that is not known yet.

    Raises:
        ZOError: there is none.
    """
    known = ALIASES.get(name, name)
    if known not in REGISTRY:
        for sentence in entry_points.load_installed():
            warnings.warn(sentence, ZOWarning, stacklevel=3)
    if known not in REGISTRY:
        raise names.unknown_rule(name, [*REGISTRY, *ALIASES])
    return REGISTRY[known]


def find_recorded(name: str, where: object, named: Sequence[str] = ()) -> Entry:
    """:func:`find` for a rule that a run on disk was made by.

    Args:
        where: the run, for the message.
        named: the plugins that it was made with, for the message alone: what a run names is never imported.

    Raises:
        ZOError: the rule is not registered here; the message says what to do.
    """
    try:
        return find(name)
    except ZOError:
        given = f" (then: {', '.join(named)})" if named else ""
        raise ZOError(
            f"{where} was made by the rule {name!r}, which is not registered here: give the file or module that "
            f"registers it by --plugin{given}, or import it first in Python; what a run names is not imported by itself"
        ) from None
