"""Look up update rules by name, and register new ones.

To add a rule to the package, write its file, import it here and add its line to :data:`zowrap.names.RULES`, from which
:data:`REGISTRY` is built. The registry feeds the command line's choices, the documentation's table and the tests'
parameter lists. A rule from outside the package joins by :func:`register`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from zowrap import names
from zowrap.errors import ZOError, ZOWarning, nearest
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
    """Add a rule from outside the package to :data:`REGISTRY`, for every command, ``zo_wrap`` and the trainer.

    Registering the same constructor again (from a reloaded module, for example) replaces it. The amount of state and
    the number of forwards per step are derived from the rule itself.

    Args:
        name: the name users write, such as ``my_rule``; also the name of the :class:`Rule` that the constructor
            returns.
        constructor: takes keyword arguments only, all with defaults, ``lr`` among them; ``zowrap rules`` prints the
            first line of its docstring. Called without arguments, it must return a rule whose ``hyper`` holds the
            value of every other keyword, as JSON can represent it: a journal records them to build the rule again.
        paper: the source of the rule: an arXiv number, a title, your own name.
        scale_free: whether multiplying the loss by a constant leaves the step unchanged.

    Raises:
        ZOError: the name is taken or the constructor does not meet the above; nothing is registered then.
    """
    validation.check_name(name, REGISTRY, ALIASES, constructor)
    rule = validation.check_constructor(name, constructor)
    if not isinstance(paper, str) or not paper.strip():
        raise ZOError(f"{name} cannot be registered: paper must name the rule's source, got {paper!r}")
    REGISTRY[name] = Entry(
        constructor, paper, validation.describe_memory(rule), validation.describe_forwards(rule), bool(scale_free)
    )


def get(rule: str | Rule, **hyper: Any) -> Rule:
    """Build the rule called ``rule`` with ``hyper`` in place of its defaults; return a :class:`Rule` as it is.

    Raises:
        ZOError: an unknown name, or a hyper-parameter that the rule does not have or that is out of range.
    """
    if isinstance(rule, Rule):
        if hyper:
            raise ZOError(f"{rule.name} is already built: give {', '.join(hyper)} to its constructor")
        return rule
    if not isinstance(rule, str):
        raise ZOError(f"rule must be a name or a rule built by zowrap.rules, got {type(rule).__name__}")
    entry = find(rule)
    name = ALIASES.get(rule, rule)
    known = entry.defaults()
    for key in hyper:
        if key not in known:
            raise ZOError(f"{name} has no hyper-parameter {key!r}{nearest(key, known)}")
    return entry.constructor(**hyper)


def find(name: str) -> Entry:
    """Find the entry of a rule by name or alias; load the rules of installed packages if it is not known yet.

    Raises:
        ZOError: there is no such rule.
    """
    known = ALIASES.get(name, name)
    if known not in REGISTRY:
        for sentence in entry_points.load_installed():
            warnings.warn(sentence, ZOWarning, stacklevel=3)
    if known not in REGISTRY:
        raise names.unknown_rule(name, [*REGISTRY, *ALIASES])
    return REGISTRY[known]


def find_recorded(name: str, where: object, named: Sequence[str] = ()) -> Entry:
    """Find the entry of the rule that a run on disk was trained with.

    Args:
        where: the run, for the message.
        named: the plugins that the run was trained with, for the message only: they are never imported from here.

    Raises:
        ZOError: the rule is not registered; the message says what to do.
    """
    try:
        return find(name)
    except ZOError:
        given = f" (then: {', '.join(named)})" if named else ""
        raise ZOError(
            f"{where} was trained with the rule {name!r}, which is not registered here: name the file or module that "
            f"registers it with --plugin{given}, or import it first in Python; zowrap never imports what a run names"
        ) from None
