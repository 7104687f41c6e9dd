"""Spell the options that an error of the library names as the command line does: ``eps`` becomes ``--eps``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from zowrap.cli.options import SharedOptions, TuneOptions
from zowrap.cli.step import rule_options
from zowrap.errors import Option, ZOError

_NAMES = {field.name for field in dataclasses.fields(TuneOptions)}


@contextmanager
def spelled_for(options: SharedOptions) -> Iterator[None]:
    """Spell the options in an error of the library as the command line does."""
    try:
        yield
    except ZOError as error:
        raise error.reworded(functools.partial(_spell, options)) from error


def _spell(options: SharedOptions, option: Option) -> str:
    """``quantized='scales'`` → ``--quantized scales``; an option that is not the command line's stays as it is."""
    if option.rule:
        if option.name not in rule_options(options):
            return str(option)
        return f"--rule-option {option.name}" + (f"={option.value}" if option.has_value else "")
    if option.name not in _NAMES:
        return str(option)
    name = f"--{option.name.replace('_', '-')}"
    return f"{name} {option.value}" if option.has_value and option.value is not True else name
