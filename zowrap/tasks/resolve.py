"""Determine the task that the user's options and data describe, and restore the task that a run saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError, list_some, nearest
from zowrap.names import TASKS as NAMES
from zowrap.storage.safetensors import LABEL_VECTORS
from zowrap.tasks.classification import (
    TEMPLATES,
    Classification,
    choose_form,
    limit_window,
    read_saved_labels,
)
from zowrap.tasks.encoder import default_pooling
from zowrap.tasks.heads import Numbering, identify, match_given, match_labels, name_classes
from zowrap.tasks.labels import are_numbers, check_classes, collect_labels, list_numbers
from zowrap.tasks.lm import LanguageModelling, choose_layout
from zowrap.tasks.loading import Source
from zowrap.tasks.rows import Row

log = logging.getLogger("zowrap")

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
    text_column: str | None = None,
    label_column: str = "label",
    pair_column: str | None = None,
    max_length: int | None = None,
    end_of_text: bool = False,
    keep_head: bool = False,
) -> tuple[Task, str]:
    """Determine the task for this data and model, and describe it in one sentence.

    Args:
        rows: the data that determines columns and labels: the training or evaluation set.
        head: ``"auto"`` or a form of classification.
        labels: names in the order of their numbers; by default those found in ``rows``.
        text_column: by default ``text``, or the columns of prompts or messages if the data has these.
        pair_column: the column of a second text.
        max_length: tokens per row; by default, and at most, the model's window.
        end_of_text: append the end-of-text token to plain text, as to completions.
        keep_head: a classification head that does not fit the labels is an error, and not replaced by a new one.

    Raises:
        ZOError: an option does not fit, or the data cannot be used.
    """
    check_task_kind(kind)
    if kind == "lm":
        length = limit_length(max_length, source.window)
        layout, column = choose_layout(rows[0], text_column)
        task: Task = LanguageModelling(layout, column, length, end_of_text)
        how = {"text": f"every token of {column!r}", "prompt": "the completion", "messages": "the assistant's turns"}
        _tell_dropped_head(source)
        return task, f"language modelling on {how[layout]}, up to {length} tokens"
    form, why = choose_form(source, head)
    length = limit_length(max_length, window_of(form, source))
    pooling = "mean"
    if form in ("sentence", "vectors"):
        encoder = source.encoder
        pooling = default_pooling(source.config) if encoder is None else encoder.modes[0]
        why += "" if encoder is None else f" ({encoder.describe()})"
    found = _number_labels(form, rows, source, labels, label_column, keep_head)
    task = Classification(
        form=form,
        labels=found.labels,
        template=TEMPLATES[form] if template is None else template,
        text_column="text" if text_column is None else text_column,
        label_column=label_column,
        max_length=length,
        pooling=pooling,
        numbered=found.numbered,
        numbers=found.numbers,
        pair_column=pair_column,
    )
    return task, f"classification by {form}: {why}"


def _number_labels(
    form: str,
    rows: Sequence[Row],
    source: Source,
    given: Sequence[str] | None,
    column: str,
    keep_head: bool,
) -> Numbering:
    """The labels of a classification in the order of its head, and how numbers in the data are read."""
    saved = read_saved_labels(Path(source.name) / LABEL_VECTORS) if form == "vectors" else None
    if given is None and saved is not None:
        return Numbering(saved, are_numbers(saved))
    own = name_classes(source) if form == "sequence" and identify(source).kind == "sequence" else []
    if given is not None:
        _tell_positions(rows, column, given)
        return (match_given(given, own, source, keep_head) if own else None) or Numbering(list(given), True)
    names = collect_labels(rows, column)
    # If the names come from the data, a number in other data is not an index but a label that training never saw.
    by_data = Numbering(names, are_numbers(names))
    found = match_labels(names, list_numbers(rows, column), own, source, keep_head) if own else None
    if found is not None:
        return found
    check_classes(names, len(rows), column)
    if form != "sequence" and are_numbers(names):
        log.warning(
            "the labels are numbers (%s), and a text is compared with their names: name them with --labels, in the "
            "order of the numbers from 0",
            list_some(names),
        )
    return by_data


def _tell_positions(rows: Sequence[Row], column: str, given: Sequence[str]) -> None:
    """Tell where the numbers in the data seem to count from 1, while those of ``--labels`` count from 0."""
    numbers = list_numbers(rows, column)
    if numbers and min(numbers) == 1 and not are_numbers(given) and max(numbers) < len(given):
        log.warning("no row has the label 0: a number is a position in --labels, and %r is number 0", given[0])


def _tell_dropped_head(source: Source) -> None:
    """Tell of a checkpoint whose head is not one for language modelling, and is not used."""
    checkpoint = identify(source)
    name = checkpoint.name or ""
    if checkpoint.kind in ("sequence", "other") and not name.endswith("ForConditionalGeneration"):
        log.warning("%s is a %s: its head is not used, because --task lm needs that of a language model",
                    source.name, name)  # fmt: skip


def window_of(form: str | None, source: Source) -> int | None:
    """The largest number of tokens of a row in a form of classification; None if nothing says."""
    return limit_window(source.encoder, source) if form in ("sentence", "vectors") else source.window


def limit_length(asked: int | None, window: int | None) -> int:
    """The largest number of tokens of a row: what is ``asked`` for, as far as the model reads it.

    Raises:
        ZOError: it is below 2.
    """
    if asked is not None and asked < 2:
        raise ZOError(f"--max-length must be at least 2, got {asked}")
    if window is None:
        return asked or UNSET_WINDOW
    if asked is not None and asked > window:
        log.warning("--max-length %d is cut to the %d tokens that the model reads", asked, window)
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
