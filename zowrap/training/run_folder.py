"""The folder of a run, called RUN: it holds all that one training writes, and all that is needed to go on from it.

    RUN/                  the tuned model (best by evaluation, else last): from_pretrained loads it
    RUN/zowrap.json       the resolved configuration and how far the run came
    RUN/journal.jsonl     the identity of the run, then one record per step (see zowrap.training.journal)
    RUN/metrics.jsonl     one line per step and one per evaluation, to plot
    RUN/history.jsonl     the Trainer's log, and the states of callbacks that have one
    RUN/before.json       the evaluation of the untuned model, row by row, to compare later ones with
    RUN/checkpoint-N/     the model and the rule's state after N steps

Checkpoints are rare: the steps after one are replayed from the journal, without a forward pass. All files are
safetensors, JSON and pictures: reading them runs no code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from zowrap.storage.atomic import TMP, guard_write, read_json, remove, sync, write_json
from zowrap.storage.folder import LEFTOVER, RunFolder
from zowrap.storage.lines import Lines
from zowrap.storage.save import save_model
from zowrap.training.checkpoint import STATE, TENSORS, TRAINER, find_unsaved
from zowrap.training.environment import describe_environment
from zowrap.training.history import History
from zowrap.training.journal import Journal
from zowrap.version import __version__

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


class Run(RunFolder):
    """The files of one RUN.

    Attributes:
        path: the folder.
        metrics: ``metrics.jsonl``.
        history: ``history.jsonl``, see :class:`zowrap.training.history.History`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.metrics = Lines(self.path / "metrics.jsonl")
        self.history = History(self.path / "history.jsonl")

    @property
    def before_file(self) -> Path:
        return self.path / "before.json"

    def before(self) -> dict[str, Any]:
        """Read the evaluations of the untuned model, by the name of the evaluation set."""
        found = read_json(self.before_file) if self.before_file.is_file() else {}
        return found if isinstance(found, dict) else {}

    def keep_before(self, name: str, found: dict[str, Any]) -> None:
        """Keep the evaluation of the untuned model on one set."""
        write_json(self.before_file, {**self.before(), name: found})

    def exists(self) -> bool:
        """Whether a training has left steps here."""
        return bool(self.checkpoints()) or self.recorded_steps() > 0

    def recorded_steps(self) -> int:
        """Count the steps that the journal holds."""
        journal = Journal.read_from(self.journal_file)
        return journal.steps() if journal else 0

    # --- zowrap.json --------------------------------------------------------------------------------------------

    def write_config(
        self,
        model: str | None,
        options: dict[str, Any],
        task: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Write ``zowrap.json``: the model, the options, what it takes to evaluate it, and digests of the data."""
        config = {"zowrap": __version__, "model": model, "options": options, "task": task or {}, "status": {}}
        if data:
            config["data"] = data
        write_json(self.config_file, config)

    def update_status(self, **facts: Any) -> None:
        """Change the given facts of the status; a new state drops the reason of an earlier failure."""
        config = self.config()
        status = dict(config.get("status") or {})
        if "state" in facts:
            status.pop("reason", None)
        config["status"] = {**status, **facts}
        write_json(self.config_file, config)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[int]:
        """List the steps of the whole checkpoints, ascending; one that is being written has another name.

        Those that hold a model alone (``save_only_model``) are left out: no run can go on from them.
        """
        return [step for step in self.saved_models() if (self.checkpoint(step) / STATE).is_file()]

    def saved_models(self) -> list[int]:
        """List the steps of the checkpoints and of those that hold a model alone, ascending."""
        if not self.path.is_dir():
            return []
        found = (_CHECKPOINT.match(entry.name) for entry in self.path.iterdir())
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if any((self.checkpoint(step) / name).is_file() for name in (STATE, TRAINER))]

    def save_checkpoint(
        self,
        step: int,
        zm: ZOModel,
        trainer_state: dict[str, Any],
        keep: int = 1,
        plan: dict[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        write_model: Callable[[Path], None] | None = None,
        model_only: bool = False,
    ) -> Path:
        """Write ``checkpoint-N``, whole or not at all, then remove the oldest beyond ``keep`` (0 keeps all).

        Args:
            step: N.
            zm: the model at that step.
            trainer_state: the Trainer's state.
            keep: how many checkpoints stay.
            plan: what the run's first start settled, see :class:`zowrap.training.resume.Start`.
            tokenizer: written beside the model.
            write_model: writes model and tokenizer into the folder that it is given, in place of :func:`save_model`.
            model_only: leave out the rule's state, without which no run can go on from there.

        Raises:
            ZOError: the disk is full; the earlier checkpoints are then as they were.
        """
        place = self.checkpoint(step)
        beside = place.with_name(place.name + TMP)
        with guard_write(place, beside):
            remove(beside)
            beside.mkdir(parents=True)
            if write_model is None:
                save_model(zm.model, beside, metadata=zm.facts(), tokenizer=tokenizer)
            else:
                write_model(beside)
            write_json(beside / TRAINER, trainer_state)
            if not model_only:
                _write_state(zm, beside, plan or {})
            remove(place)
            os.replace(beside, place)
        if keep > 0:
            for old in self.saved_models()[:-keep]:
                remove(self.checkpoint(old))
        return place

    def clean(self) -> None:
        """Remove what a kill in the middle of a write left behind."""
        for entry in list(self.path.iterdir()) if self.path.is_dir() else []:
            if LEFTOVER.match(entry.name):
                remove(entry)

    def list_entries(self) -> set[Path]:
        """List every file and folder in the run, at any depth."""
        return set(self.path.rglob("*"))

    def remove_all_but(self, entries: set[Path]) -> None:
        """Remove every file and folder that is not among these."""
        for path in sorted(self.list_entries() - entries, reverse=True):
            remove(path)


def _write_state(zm: ZOModel, folder: Path, plan: dict[str, Any]) -> None:
    """Write the rule's state into a checkpoint, and the weights that its model files do not hold bit for bit."""
    state = zm.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for index in find_unsaved(zm, folder):
        tensors[f"weights/{zm.parameters[index].name}"] = zm.parameters[index].tensor
    # The file of an 8-bit model does not tell them: it holds the scales that tuning left.
    tensors.update({f"scales/{p.name}": p.scale for p in zm.parameters if p.scale is not None})
    there = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(there, folder / TENSORS, metadata={"format": "pt"})
    sync(folder / TENSORS)
    rest = {name: value for name, value in state.items() if name not in tensors}
    write_json(folder / STATE, {**rest, "environment": describe_environment(zm), "plan": plan})
