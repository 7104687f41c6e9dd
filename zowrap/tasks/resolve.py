"""Determine the task that the user's options and data describe, and restore the task that a run saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError, nearest
from zowrap.names import TASKS as NAMES
from zowrap.storage.safetensors import LABEL_VECTORS
from zowrap.tasks.classification import (
    TEMPLATES,
    Classification,
    choose_form,
    limit_window,
    order_labels,
    read_saved_labels,
)
from zowrap.tasks.encoder import default_pooling
from zowrap.tasks.lm import LanguageModelling, choose_layout
from zowrap.tasks.loading import Source
from zowrap.tasks.rows import Row, are_numbers, collect_labels

Task = Classification | LanguageModelling
TASKS: dict[str, type[Task]] = dict(zip(NAMES, (Classification, LanguageModelling), strict=True))

# The length if neither the model nor the user sets one: long enough for paragraphs, short enough for attention.
UNSET_WINDOW = 2048


def check_task_kind(kind: str) -> str:
    """Return ``kind`` if it is the name of a task.

    Raises:
        ZOError: it is not; the message suggests the nearest name.
    """
    if kind not in TASKS:
        raise ZOError(f"unknown --task {kind!r}{nearest(kind, TASKS)}")
    return kind


def resolve(
    kind: str,
    rows: Sequence[Row],
    source: Source,
    *,
    head: str = "auto",
    labels: Sequence[str] | None = None,
    template: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    max_length: int | None = None,
    end_of_text: bool = False,
) -> tuple[Task, str]:
    """Determine the task for this data and model, and describe it in one sentence.

    Args:
        rows: the data that determines columns and labels: the training or evaluation set.
        head: ``"auto"`` or a form of classification.
        labels: names in the order of their numbers; by default those found in ``rows``.
        max_length: tokens per row; by default, and at most, the model's window.
        end_of_text: append the end-of-text token to plain text, as to completions.

    Raises:
        ZOError: an option does not fit, or the data cannot be used.
    """
    check_task_kind(kind)
    length = _limit_length(max_length, source.window)
    if kind == "lm":
        layout, column = choose_layout(rows[0], text_column)
        task: Task = LanguageModelling(layout, column, length, end_of_text)
        how = {"text": f"every token of {column!r}", "prompt": "the completion", "messages": "the assistant's turns"}
        return task, f"language modelling on {how[layout]}, up to {length} tokens"
    form, why = choose_form(source, head)
    pooling = "mean"
    if form in ("sentence", "vectors"):
        encoder = source.encoder
        length = _limit_length(max_length, limit_window(encoder, source))
        pooling = default_pooling(source.config) if encoder is None else encoder.modes[0]
        why += "" if encoder is None else f" ({encoder.describe()})"
    saved = read_saved_labels(Path(source.name) / LABEL_VECTORS) if form == "vectors" else None
    names = list(labels) if labels else saved or collect_labels(rows, label_column)
    # If the names come from the data, a number in other data is not an index but a label that training never saw.
    numbered = bool(labels) or are_numbers(names)
    if form == "sequence" and not labels:
        names = order_labels(names, source)
    task = Classification(
        form=form,
        labels=names,
        template=TEMPLATES[form] if template is None else template,
        text_column=text_column,
        label_column=label_column,
        max_length=length,
        pooling=pooling,
        numbered=numbered,
    )
    return task, f"classification by {form}: {why}"


def _limit_length(asked: int | None, window: int | None) -> int:
    if asked is not None and asked < 2:
        raise ZOError(f"--max-length must be at least 2, got {asked}")
    if window is None:
        return asked or UNSET_WINDOW
    return min(asked or window, window)


def restore_task(record: dict[str, Any]) -> Task:
    """Restore a task from the record that a run saved.

    Raises:
        ZOError: this version does not know the task.
    """
    fields = dict(record)
    kind = fields.get("kind", "")
    if kind not in TASKS:
        raise ZOError(f"this run has a task {kind!r}, which this version of zowrap does not know")
    try:
        return TASKS[kind](**fields)
    except TypeError as error:
        raise ZOError(f"this run's task cannot be read: {error}") from error
