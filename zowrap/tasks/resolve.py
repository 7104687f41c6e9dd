"""Which task a user's options and data describe, and the task that a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError, nearest
from zowrap.names import TASKS as NAMES
from zowrap.storage.safetensors import LABEL_VECTORS
from zowrap.tasks.classification import TEMPLATES, Classification, choose_form, order_labels, pooling_of, saved_labels
from zowrap.tasks.lm import LanguageModelling, choose_layout
from zowrap.tasks.loading import Source
from zowrap.tasks.rows import Row, are_numbers, label_names

Task = Classification | LanguageModelling
TASKS: dict[str, type[Task]] = dict(zip(NAMES, (Classification, LanguageModelling), strict=True))

# Where neither the model nor the user sets a length: long enough for paragraphs, short enough for attention.
UNSET_WINDOW = 2048


def check_kind(kind: str) -> str:
    """``kind`` if it is a task's name.

    Raises:
        ZOError: it is not (the message names the nearest one).
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
    """The task for this data and model, every choice made, and a sentence on the form and why.

    Args:
        rows: the data that decides columns and labels: training data, or what is evaluated.
        head: ``"auto"`` or a form of classification.
        labels: names in the order that numbers them; by default those found in ``rows``.
        max_length: tokens per row; by default, and at most, what the model reads.
        end_of_text: close plain text with the end-of-text token, as completions always are.

    Raises:
        ZOError: an option that does not fit, or data that cannot be used.
    """
    check_kind(kind)
    length = _length(max_length, source)
    if kind == "lm":
        layout, column = choose_layout(rows[0], text_column)
        task: Task = LanguageModelling(layout, column, length, end_of_text)
        how = {"text": f"every token of {column!r}", "prompt": "the completion", "messages": "the assistant's turns"}
        return task, f"language modelling on {how[layout]}, up to {length} tokens"
    form, why = choose_form(source, head)
    saved = saved_labels(Path(source.name) / LABEL_VECTORS) if form == "vectors" else None
    names = list(labels) if labels else saved or label_names(rows, label_column)
    # Names that come from the data are what the data says; a number then is a label that training never saw.
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
        pooling=pooling_of(source) if form in ("sentence", "vectors") else "mean",
        numbered=numbered,
    )
    return task, f"classification by {form}: {why}"


def _length(asked: int | None, source: Source) -> int:
    if asked is not None and asked < 2:
        raise ZOError(f"--max-length must be at least 2, got {asked}")
    window = source.window
    if window is None:
        return asked or UNSET_WINDOW
    return min(asked or window, window)


def from_record(record: dict[str, Any]) -> Task:
    """A task from what a run saved.

    Raises:
        ZOError: the record is of a task this version does not know.
    """
    fields = dict(record)
    kind = fields.get("kind", "")
    if kind not in TASKS:
        raise ZOError(f"this run was made for a task {kind!r} that this version does not know")
    try:
        return TASKS[kind](**fields)
    except TypeError as error:
        raise ZOError(f"this run's task cannot be read: {error}") from error
