"""Check a constructor before it is registered, and describe the rule that it builds."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zowrap.errors import ZOError
from zowrap.rules import estimators
from zowrap.rules.base import Rule

if TYPE_CHECKING:
    from zowrap.rules.entry import Entry

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def check_name(
    name: str, registry: Mapping[str, Entry], aliases: Mapping[str, str], constructor: Callable[..., Rule]
) -> None:
    """Raise :class:`ZOError` unless ``name`` is well formed and free, or taken by an earlier load of this module."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ZOError(f"a rule's name must consist of lowercase letters, digits and _, such as my_rule, not {name!r}")
    if name in aliases:
        raise ZOError(
            f"there is already a rule {name!r} (an alias of {aliases[name]}): register yours under another name"
        )
    if name not in registry:
        return
    place = _place(registry[name].constructor)
    if place != _place(constructor) or str(place[0]).startswith("zowrap.rules."):
        raise ZOError(f"there is already a rule {name!r}: register yours under another name")


def _place(constructor: Callable[..., Any]) -> tuple[Any, Any]:
    """The constructor's module and name, which stay the same when its module is reloaded."""
    return getattr(constructor, "__module__", None), getattr(constructor, "__qualname__", constructor)


def check_constructor(name: str, constructor: Callable[..., Rule]) -> Rule:
    """Build the rule with its defaults, checking everything that :func:`zowrap.rules.register` requires.

    Raises:
        ZOError: users could not pass every hyper-parameter by name, or a journal could not record and repeat it.
    """

    def refuse(why: str) -> ZOError:
        return ZOError(f"{name} cannot be registered: {why}")

    if not callable(constructor):
        raise refuse(f"its constructor must be a function that returns a rule, got {constructor!r}")
    try:
        parameters = inspect.signature(constructor).parameters
    except ValueError as error:
        raise refuse(f"its constructor must be a Python function, got {constructor!r}") from error
    for parameter in parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise refuse(
                f"{parameter} must be a keyword-only argument with a default: def {name}(*, {parameter.name}=...)"
            )
    if not inspect.getdoc(constructor):
        raise refuse("its constructor needs a docstring: zowrap rules prints its first line")
    try:
        rule = constructor()
    except Exception as error:
        raise refuse(f"its constructor fails without arguments ({type(error).__name__}: {error})") from error
    if not isinstance(rule, Rule):
        raise refuse(f"its constructor must return a zowrap.rules.Rule, got {type(rule).__name__}")
    if rule.name != name:
        raise refuse(f"its constructor returns a rule called {rule.name!r}")
    given, held = set(parameters), {"lr", *rule.hyper}
    if given != held:
        missing, extra = sorted(given - held), sorted(held - given)
        raise refuse(
            f"Rule(hyper=...) must contain {missing[0]}, which the constructor takes"
            if missing
            else f"its constructor must take {extra[0]}, which its Rule(lr=..., hyper=...) contains"
        )
    try:
        kept = json.loads(json.dumps(dict(rule.hyper))) == dict(rule.hyper)
    except (TypeError, ValueError):
        kept = False
    if not kept:
        raise refuse(f"its hyper-parameters must be numbers, strings, flags or None, got {dict(rule.hyper)!r}")
    return rule


def describe_memory(rule: Rule) -> str:
    """The size of the rule's state in units of the tunable parameters, such as ``"2"``, from its slots."""
    text = str(len(rule.slot_names("element")))
    return text + " (and r per row)" if rule.slot_names("left") else text


def describe_forwards(rule: Rule) -> str:
    """The forward passes of a step in terms of its q queries, such as ``"2q"`` or ``"q + 1"``, from its points."""
    points = rule.points or estimators.get_estimator(rule.defaults.estimator).points
    few, more = len(points(2)), len(points(3))
    slope, rest = more - few, few - 2 * (more - few)
    per_query = {0: "", 1: "q"}.get(slope, f"{slope}q")
    return " + ".join(part for part in (per_query, str(rest) if rest or not per_query else "") if part)
