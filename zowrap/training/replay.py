"""Replaying a run: its weights are made again from the journal, without a forward pass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zowrap.errors import ZOError
from zowrap.rules.estimators import get_estimator
from zowrap.step.credit import NO_REPLAY
from zowrap.step.options import IDENTITY
from zowrap.storage.save import save_model
from zowrap.training.journal import Journal, fingerprint

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel


def replay(zm: ZOModel, journal: Journal, until: int | None = None) -> int:
    """Apply the journal's records after the steps of ``zm``, up to step ``until`` (default: all).

    Returns:
        The step reached.
    """
    for record in journal.records(after=zm.step_count):
        if until is not None and record["step"] >= until:
            break
        zm.replay(record)
    return zm.step_count


def replay_run(
    model: nn.Module, run: str | os.PathLike[str], to: str | os.PathLike[str] | None = None, tokenizer: Any = None
) -> ZOModel:
    """Make the last weights of a RUN again from the base model and the journal alone, bitwise.

    Args:
        model: the model that the run started from: same weights, same dtype. It is changed in place.
        run: the RUN, or a journal file of one.
        to: the folder to write the model into, if given, as :func:`zowrap.storage.save.save_model` does.
        tokenizer: written beside the model.

    Raises:
        ZOError: the journal is not there, damaged, or was written for other weights.
    """
    from zowrap import rules
    from zowrap.wrap import zo_wrap

    file = Path(run) / "journal.jsonl" if Path(run).is_dir() else Path(run)
    journal = Journal.read_from(file)
    if journal is None:
        raise ZOError(f"there is no journal at {file}")
    head = journal.header
    if get_estimator(head["estimator"]).credit:
        raise ZOError(f"{file} is of a run with estimator 'residual': {NO_REPLAY}")
    rules.find_recorded(head["rule"], file)
    moves = set(head["parameters"])
    options: dict[str, Any] = {name: head.get(name) for name in IDENTITY}
    options |= {
        "rule": rules.get(head["rule"], **head["hyper"]),
        "trainable": lambda name, tensor: name in moves,
        # Each record holds its own weight decay; this one says that there may be any.
        "weight_decay": _weight_decay(journal),
        "engine": "eager",
    }
    zm = zo_wrap(model, **options)
    check_start(zm, journal)
    replay(zm, journal)
    if to is not None:
        base = head["model"]
        save_model(model, to, {**zm.facts(), **({"base_model": base} if base else {})}, tokenizer=tokenizer)
    return zm


def _weight_decay(journal: Journal) -> float:
    return max((record.get("weight_decay", 0.0) for record in journal.records()), default=0.0)


def check_start(zm: ZOModel, journal: Journal) -> None:
    """Raise :class:`ZOError` unless ``zm`` holds the weights that the journal's run started from."""
    names = [parameter.name for parameter in zm.parameters]
    missing = set(journal.header["parameters"]) - set(names)
    if missing:
        raise ZOError(f"{journal.path} is the journal of another model: this one has no {sorted(missing)[0]} to move")
    if journal.header["weights"] != fingerprint(zm):
        raise ZOError(
            f"{journal.path} starts from other weights than this model's: load the base model that the run started "
            f"from ({journal.header['model'] or 'its name was not recorded'}), in the same dtype"
        )
