"""Turn the options of the command line into those of a step, as ``zo_wrap`` and ``ZOConfig`` take them."""

from __future__ import annotations

import json
import math
from typing import Any

from zowrap.cli.options import SharedOptions, TuneOptions
from zowrap.errors import ZOError
from zowrap.step.options import StepOptions, values_of


def step_values(options: SharedOptions) -> dict[str, Any]:
    """The options of a step as ``zo_wrap`` and ``ZOConfig`` take them, but for the rule, which has options of its own.

    ``lr`` is left out of those that do not train.
    """
    values = values_of(options)
    values["lr"] = learning_rate(options) if isinstance(options, TuneOptions) else None
    if options.blocks == ["layer"]:
        values["blocks"] = "layer"
    return values


def choose_step_method(options: SharedOptions) -> None:
    """Raise :class:`ZOError` where rule, direction, estimator and the like do not go together."""
    from zowrap.rules.registry import get
    from zowrap.step.method import choose_method

    choose_method(StepOptions(**{**step_values(options), "rule": get(options.rule, **rule_options(options))}))


def rule_options(options: SharedOptions) -> dict[str, Any]:
    """``["beta=0.9"]`` → ``{"beta": 0.9}``."""
    values: dict[str, Any] = {}
    for item in options.rule_option:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ZOError(f"--rule-option takes name=value, got {item!r}")
        if name.strip() == "lr":
            raise ZOError("the learning rate has an option of its own: --lr")
        try:
            values[name.strip().replace("-", "_")] = json.loads(text.lower() if text in ("True", "False") else text)
        except json.JSONDecodeError:
            values[name.strip().replace("-", "_")] = text.strip()
    return values


def learning_rate(options: TuneOptions) -> float | str:
    """``--lr`` as a number, or ``"auto"``.

    Raises:
        ZOError: it is neither, or not positive and finite.
    """
    if options.lr == "auto":
        return "auto"
    try:
        lr = float(options.lr)
    except ValueError:
        lr = math.nan
    if not math.isfinite(lr) or lr <= 0:
        raise ZOError(f"--lr must be a positive finite number or auto, got {options.lr}")
    return lr
