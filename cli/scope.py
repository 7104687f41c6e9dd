"""The task, form, layout and format that each option belongs to. Given elsewhere it would do nothing, and is refused.

One table for all commands: an option that depends on something has a line here, and each command asks
:func:`check_scope` as soon as it knows what its task, form and layout are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import typer

from zowrap.cli.options import given
from zowrap.errors import ZOError


@dataclass(frozen=True)
class Scope:
    """Where an option has an effect; what is empty does not matter.

    Attributes:
        option: its name in Python.
        commands: the commands that this line is about.
        task, form, layout, format: where it has one (``layout``: of the data of a language model; ``format``: of an
            export).
        needs: options, one of which has to be given with it; ``option=value`` is one that has to have this value.
        without: options that take its effect away.
        instead: a clause that says what to do.
    """

    option: str
    commands: tuple[str, ...] = ("tune", "eval", "inspect")
    task: tuple[str, ...] = ()
    form: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    format: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    instead: str = ""


_CLASSES = ("classification",)
_ROWS = "it says how rows are read, and without --data none are read"
_NONE = "it is about adapters, and there are none: add --use-peft"

SCOPES = (
    Scope("head", task=_CLASSES),
    Scope("labels", task=_CLASSES),
    Scope("label_column", task=_CLASSES),
    Scope("template", task=_CLASSES, instead="give text as it is to be learned, or columns prompt and completion"),
    Scope("text_pair_column", task=_CLASSES, form=("sequence",), instead="put both texts into one with --template"),
    Scope("end_of_text", task=("lm",), layout=("text",), instead="completions and turns are closed by themselves"),
    Scope(
        "text_column", layout=("text", "messages"), instead="prompts are read from the columns prompt and completion"
    ),
    *(
        Scope(name, commands=("inspect",), needs=("data",), instead=_ROWS)
        for name in ("template", "text_column", "text_pair_column", "label_column", "end_of_text")
    ),
    Scope("eval_every", commands=("tune",), needs=("eval_data",)),
    Scope("max_eval_examples", commands=("tune",), needs=("eval_data",)),
    Scope("eval_batch_size", commands=("tune",), needs=("eval_data", "test_data")),
    Scope("block_order", commands=("tune", "inspect"), needs=("blocks",)),
    *(
        Scope(
            name, commands=("tune", "inspect"), needs=("use_peft", "load_in_4bit", "quantized=adapters"), instead=_NONE
        )
        for name in ("lora_r", "lora_alpha", "lora_target_modules")
    ),
    Scope(
        "memory",
        commands=("tune", "inspect"),
        without=("engine=eager",),
        instead="the eager engine has one way to do a step",
    ),
    Scope("dtype", commands=("export",), format=("same",), instead="--format says what the weights become"),
    Scope("allow_pickle", commands=("export",), format=("same",), instead="convert the pickle in an export of its own"),
    Scope("max_shard_size", commands=("export",), format=("same", "bf16", "fp32", "merged")),
)
OWN = "own"  # in place of a task: the class that a checkpoint names, with its own loss
# What is asked of a line beside its option, in words.
_KINDS = {"task": "--task {}", "form": "--head {}", "layout": "data of the kind {!r}", "format": "--format {}"}


def list_asked(context: typer.Context, options: Any) -> frozenset[str]:
    """List the options that the user gave, on the command line or in a file, but for those left to the program.

    Returns:
        Names; of those with a text also ``name=text``.
    """
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    asked = {name for name, value in values.items() if value not in (None, False, [], "auto") and given(context, name)}
    return frozenset({*asked, *(f"{name}={values[name]}" for name in asked if isinstance(values[name], str))})


def check_scope(
    command: str,
    asked: frozenset[str],
    *,
    task: str | None = None,
    form: str | None = None,
    layout: str | None = None,
    format: str | None = None,
) -> None:
    """Raise :class:`ZOError` for the first option that has no effect here.

    Args:
        asked: the options that the user gave, see :func:`list_asked`.
        task, form, layout, format: as far as they are known.
    """
    known = {"task": task, "form": form, "layout": layout, "format": format}
    for scope in SCOPES:
        if scope.option not in asked or command not in scope.commands:
            continue
        name = spell(scope.option)
        for kind, value in known.items():
            right = getattr(scope, kind)
            if right and value is not None and value not in right:
                belongs = " or ".join(_KINDS[kind].format(each) for each in right)
                here = (
                    f"without {belongs}" if value == OWN else f"with {_KINDS[kind].format(value)}, it is for {belongs}"
                )
                raise ZOError(f"{name} does nothing {here}: {scope.instead or 'leave it out'}")
        taken = next((each for each in scope.without if each in asked), None)
        if taken is not None:
            raise ZOError(f"{name} does nothing with {spell(taken)}: {scope.instead or 'leave it out'}")
        if scope.needs and asked.isdisjoint(scope.needs):
            needed = " or ".join(map(spell, scope.needs))
            raise ZOError(f"{name} does nothing without {needed}: {scope.instead or 'add that, or leave it out'}")


def check_columns(asked: frozenset[str], template: str | None) -> None:
    """Raise :class:`ZOError` where the user names the column of a field that the template does not have."""
    if template is None or "text_column" not in asked:
        return
    from zowrap.tasks.templates import parse

    if "text" not in (field for _, field in parse(template)):
        raise ZOError(
            f"--text-column is the column of {{text}}, and --template {template!r} has no such field: leave it out, or "
            "put {text} into the template"
        )


def spell(option: str) -> str:
    """``text_column`` → ``--text-column``, ``engine=eager`` → ``--engine eager``."""
    name, _, value = option.partition("=")
    return " ".join(filter(None, (f"--{name.replace('_', '-')}", value)))
