"""Questions that several commands ask of a task: which one it is, its labels, its token counts, where to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zowrap.cli.console import say
from zowrap.cli.options import split_labels
from zowrap.cli.scope import check_columns, check_scope
from zowrap.errors import ZOError
from zowrap.storage.atomic import contains
from zowrap.storage.folder import RunFolder
from zowrap.storage.lock import list_entries
from zowrap.storage.safetensors import adapters_base, adapters_folder, named_adapters


def saved_task(model: str) -> dict[str, Any] | None:
    """The task that a run keeps in ``zowrap.json``, or None where ``model`` is no run."""
    run = RunFolder(model)
    return (run.config().get("task") or None) if run.config_file.is_file() else None


def resolve_task(
    command: str, options: Any, asked: frozenset[str], rows: Any, source: Any, keep_head: bool = False
) -> Any:
    """Resolve the task that the options of a command describe, and give the reason for its form.

    Args:
        asked: the options that the user gave; those that have no effect on this task are refused.
        keep_head: as in :func:`zowrap.tasks.resolve.resolve`.
    """
    from zowrap.tasks.resolve import resolve

    check_columns(asked, options.template)
    task, why = resolve(
        options.task,
        rows,
        source,
        head=options.head,
        labels=split_labels(options.labels),
        template=options.template,
        text_column=options.text_column if "text_column" in asked else None,
        label_column=options.label_column,
        pair_column=options.text_pair_column,
        max_length=options.max_length,
        end_of_text=options.end_of_text,
        keep_head=keep_head,
    )
    check_task_scope(command, asked, task.record())
    return task, why


def check_task_scope(command: str, asked: frozenset[str], task: dict[str, Any]) -> None:
    """Raise :class:`ZOError` for an option that does nothing in a task, given by its record."""
    check_scope(command, asked, task=task.get("kind"), form=task.get("form"), layout=task.get("layout"))


def say_counts(examples: Any, max_length: int, what: str = "rows") -> None:
    """Tell once what tokenising did to the data."""
    if examples.truncated:
        say(
            f"{examples.truncated} of {len(examples) + examples.dropped} {what} "
            f"were longer than {max_length} tokens and cut"
        )
    if examples.lost_turns:
        turns = "turn of the assistant is" if examples.lost_turns == 1 else "turns of the assistant are"
        say(f"{examples.lost_turns} {turns} not learned, because the chat template does not show where they stand")
    if examples.dropped:
        say(f"{examples.dropped} {what} had no token to learn from and were left out")


def recorded_base(folder: str | Path) -> str | None:
    """The model that a run, or a folder of adapters, says it was made from."""
    run = RunFolder(folder)
    named = run.config().get("model") if run.config_file.is_file() else None
    return named or adapters_base(folder)


def say_other_adapters(folder: str | Path) -> None:
    """Say which adapters a folder holds beside those that are used."""
    used = adapters_folder(folder)
    others = [each.name for each in named_adapters(folder) if each != used]
    if others and used == Path(folder).expanduser():
        say(
            f"{folder} also holds the adapters {', '.join(others)}, which are left out: each can be given by its folder"
        )


def check_target(to: str, overwrite: bool, option_name: str, *kept: Any) -> None:
    """Raise :class:`ZOError` unless ``to`` is a directory that may be written: new, empty, or to be replaced.

    Args:
        kept: folders that the command reads, or that what it reads was made from: they are never written over, by
            whatever name.
    """
    path = Path(to)
    if path.exists() and not path.is_dir():
        raise ZOError(f"{option_name} {to} is a file: give the name of a directory")
    for folder in kept:
        if isinstance(folder, str) and Path(folder).exists() and contains(to, folder):
            raise ZOError(
                f"{option_name} {to} is or holds {folder}, which would be written over: give another directory"
            )
    if list_entries(path) and not overwrite:
        raise ZOError(f"{option_name} {to} is not empty: give a new directory, or --overwrite")
