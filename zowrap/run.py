"""A RUN: the folder that one training writes, and everything needed to go on from it.

    RUN/                  the tuned model (best by evaluation, else last): from_pretrained loads it
    RUN/zowrap.json       the resolved configuration and how far the run came
    RUN/journal.jsonl     what run this is, then one record per step (see zowrap.journal)
    RUN/metrics.jsonl     one line per step and one per evaluation, to plot
    RUN/before.json       what the untuned model came to, row by row, to compare later evaluations with
    RUN/checkpoint-N/     the model and the rule's state after N steps

A checkpoint is a rare snapshot: what lies between it and the present is replayed from the journal, without a forward
pass. Only safetensors, JSON and pictures: nothing in here runs code when it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zowrap
from zowrap import export, weights
from zowrap.errors import ZOError
from zowrap.files import TMP, read_json, remove, sync, write_json, writing
from zowrap.folder import LEFTOVER, RunFolder
from zowrap.journal import Journal, Lines, environment, fingerprint
from zowrap.parameters import Parameter, canonical_name

if TYPE_CHECKING:
    from zowrap.model import ZOModel

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
STATE, TENSORS, TRAINER = "zo_state.json", "zo_state.safetensors", "trainer_state.json"


class Run(RunFolder):
    """The files of one RUN.

    Attributes:
        path: the folder.
        metrics: ``metrics.jsonl``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.metrics = Lines(self.path / "metrics.jsonl")

    @property
    def before_file(self) -> Path:
        return self.path / "before.json"

    def before(self) -> dict[str, Any]:
        """What the untuned model came to, by the name of the evaluation set."""
        found = read_json(self.before_file) if self.before_file.is_file() else {}
        return found if isinstance(found, dict) else {}

    def keep_before(self, name: str, found: dict[str, Any]) -> None:
        """Keep what the untuned model came to on one set."""
        write_json(self.before_file, {**self.before(), name: found})

    def exists(self) -> bool:
        """Whether a training has left steps here."""
        return bool(self.checkpoints()) or self.recorded_steps() > 0

    def recorded_steps(self) -> int:
        """Steps that the journal holds."""
        journal = Journal.read_from(self.journal_file)
        return journal.steps() if journal else 0

    # --- zowrap.json --------------------------------------------------------------------------------------------

    def write_config(self, model: str | None, options: dict[str, Any], task: dict[str, Any] | None = None) -> None:
        """Write ``zowrap.json``: what model, with what options, and what the task needs to evaluate the result."""
        config = {"zowrap": zowrap.__version__, "model": model, "options": options, "task": task or {}, "status": {}}
        write_json(self.config_file, config)

    def update_status(self, **facts: Any) -> None:
        """Change the given facts of the status; of another state, the reason of a failure is dropped."""
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
        """Steps of the whole checkpoints, ascending. One that is being written has another name."""
        if not self.path.is_dir():
            return []
        found = (_CHECKPOINT.match(entry.name) for entry in self.path.iterdir())
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if (self.checkpoint(step) / STATE).is_file()]

    def save_checkpoint(
        self, step: int, zm: ZOModel, trainer_state: dict[str, Any], keep: int = 1, plan: dict[str, Any] | None = None
    ) -> Path:
        """Write ``checkpoint-N``, whole or not at all, then remove the oldest beyond ``keep`` (0 keeps all).

        ``plan`` is what the run settled at its first start, see :class:`zowrap.resume.Start`.

        Raises:
            ZOError: the disk is full; the earlier checkpoints are then as they were.
        """
        place = self.checkpoint(step)
        beside = place.with_name(place.name + TMP)
        with writing(place, beside):
            remove(beside)
            beside.mkdir(parents=True)
            export.save_model(zm.model, beside, metadata=zm.facts())
            state = zm.state_dict()
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            for index in _unsaved(zm, beside):
                tensors[f"weights/{zm.parameters[index].name}"] = zm.parameters[index].tensor
            # Of the file of an 8-bit model these cannot be told: it holds the scales that tuning left.
            tensors.update({f"scales/{p.name}": p.scale for p in zm.parameters if p.scale is not None})
            there = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(there, beside / TENSORS, metadata={"format": "pt"})
            sync(beside / TENSORS)
            write_json(beside / TRAINER, trainer_state)
            rest = {name: value for name, value in state.items() if name not in tensors}
            write_json(beside / STATE, {**rest, "environment": environment(zm), "plan": plan or {}})
            remove(place)
            os.replace(beside, place)
        if keep > 0:
            for old in self.checkpoints()[:-keep]:
                remove(self.checkpoint(old))
        return place

    def clean(self) -> None:
        """Remove what a kill in the middle of a write left behind."""
        for entry in list(self.path.iterdir()) if self.path.is_dir() else []:
            if LEFTOVER.match(entry.name):
                remove(entry)


def checkpoint_facts(directory: Path, name: str) -> dict[str, Any]:
    """The ``"environment"`` that a checkpoint was written in, or its run's ``"plan"``; empty where it does not say."""
    return _read_object(directory / STATE).get(name) or {} if (directory / STATE).is_file() else {}


def load_checkpoint(directory: str | os.PathLike[str], zm: ZOModel) -> dict[str, Any]:
    """Put the weights and the rule's state of a checkpoint into ``zm``, in place and bitwise.

    Returns:
        The trainer's state.

    Raises:
        ZOError: the checkpoint is of another model, rule or set of options, or damaged.
    """
    directory = Path(directory)
    if not (directory / STATE).is_file():
        raise ZOError(f"{directory} is not a checkpoint of zowrap: there is no {STATE} in it")
    tensors: dict[str, Tensor] = {}
    if (directory / TENSORS).is_file():
        with weights.opened(directory / TENSORS) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    apart = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    state = {name: t for name, t in tensors.items() if not name.startswith(("weights/", "scales/"))}
    stored = list(_stored_weights(directory, zm, apart))  # all checked before anything changes
    scales = list(_stored_scales(directory, zm, tensors))
    trainer_state = _read_object(directory / TRAINER)
    zm.load_state_dict({**_read_object(directory / STATE), **state})
    _put(zm, stored)
    with torch.no_grad():
        for scale, value in scales:
            scale.copy_(value)
    return trainer_state


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise ZOError(f"{file} is damaged: it holds no JSON object")
    return value


def load_weights(directory: str | os.PathLike[str], zm: ZOModel) -> None:
    """Put the weights that a model folder holds into ``zm``'s model, in place; the rule's state stays.

    Raises:
        ZOError: they are another model's.
    """
    _put(zm, list(_stored_weights(Path(directory), zm, {})))


def _put(zm: ZOModel, tensors: list[tuple[int, Tensor]]) -> None:
    with torch.no_grad():
        for index, stored in tensors:
            zm.parameters[index].tensor.copy_(stored)


def _stored_weights(directory: Path, zm: ZOModel, apart: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(index of the parameter, its stored tensor), each checked to fit."""
    found = _stored_parameters(zm, directory)
    for index, parameter in enumerate(zm.parameters):
        stored = apart.get(parameter.name)
        if stored is None:
            if index not in found and parameter.scale is not None:
                stored = _log_scale(directory, zm, parameter)
            elif index not in found:
                raise ZOError(f"{directory} is of another model: it has no {parameter.name}")
            else:
                file, name = found[index]
                with weights.opened(file) as opened:
                    stored = opened.get_tensor(name)
        if stored.shape != parameter.tensor.shape or stored.dtype != parameter.tensor.dtype:
            raise ZOError(
                f"{directory} is of another model: {parameter.name} is {stored.dtype} of shape "
                f"{tuple(stored.shape)} there, {parameter.tensor.dtype} of shape {tuple(parameter.tensor.shape)} here"
            )
        yield index, stored


def _stored_scales(directory: Path, zm: ZOModel, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(scales, their stored values): those that the run began with, whatever model this one was loaded from."""
    for parameter in zm.parameters:
        value = tensors.get(f"scales/{parameter.name}")
        if parameter.scale is None or value is None:  # checkpoints of earlier versions have none
            continue
        if value.shape != parameter.scale.shape:
            raise ZOError(f"{directory} is of another model: the scales of {parameter.name} have another shape there")
        yield parameter.scale, value


def _log_scale(directory: Path, zm: ZOModel, parameter: Parameter) -> Tensor:
    """log(stored scale / the base's scale): a file of an 8-bit model holds the scales that tuning left."""
    _, prefix = export.saved_part(zm.model)
    layer = parameter.name.removesuffix("log_scale")
    wanted = (layer + "SCB", layer + "_weight_scale")  # bitsandbytes' name, torchao's
    for file in weights.weight_files(directory):
        with weights.opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                if canonical_name(prefix + name) in wanted and parameter.scale is not None:
                    base = parameter.scale.detach().float().cpu().reshape(-1)
                    ratio = opened.get_tensor(name).float().reshape(-1) / base
                    return torch.where(base > 0, ratio, 1.0).log()
    raise ZOError(f"{directory} is of another model: it has no {wanted[0]}")


def _stored_parameters(zm: ZOModel, directory: Path) -> dict[int, tuple[Path, str]]:
    """Where the weight files in ``directory`` hold what moves: index in ``zm.parameters`` → (file, name in it)."""
    _, prefix = export.saved_part(zm.model)
    where: dict[str, tuple[Path, str]] = {}
    for file in weights.weight_files(directory):
        with weights.opened(file) as opened:
            where.update({canonical_name(prefix + name): (file, name) for name in opened.keys()})  # noqa: SIM118
    for apart, prefix, module in export.saved_apart(zm.model):
        if (directory / apart).is_file():
            where.update({canonical_name(prefix + name): (directory / apart, name) for name in module.state_dict()})
    found = {}
    for index, parameter in enumerate(zm.parameters):
        name = next((n for n in map(canonical_name, parameter.names) if n in where), None)
        if name is not None:
            found[index] = where[name]
    return found


def _unsaved(zm: ZOModel, directory: Path) -> list[int]:
    """Which of ``zm.parameters`` the weight files in ``directory`` do not hold bit for bit.

    An adapter's base, a format that fuses or transposes weights: a checkpoint keeps those tensors apart.
    """
    found = _stored_parameters(zm, directory)
    return [i for i, p in enumerate(zm.parameters) if i not in found or not _holds(*found[i], p.tensor)]


def _holds(file: Path, name: str, tensor: Tensor) -> bool:
    """Whether the file holds exactly this tensor under that name: shape, dtype and every bit."""
    with weights.opened(file) as opened:
        if tuple(opened.get_slice(name).get_shape()) != tuple(tensor.shape):
            return False
        stored = opened.get_tensor(name)
    return stored.dtype == tensor.dtype and _bits(stored).equal(_bits(tensor.detach().cpu()))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def replay(zm: ZOModel, journal: Journal, until: int | None = None) -> int:
    """Apply the journal's records from where ``zm`` stands to step ``until`` (default: all), without a forward pass.

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
    """The last weights of a RUN from the base model and the journal alone, bitwise; written to ``to`` if given.

    Args:
        model: as the run started from it: same weights, same dtype. It is changed in place.
        run: the RUN, or a journal file of one.
        to: where to write the model, as :func:`zowrap.export.save_model` does.
        tokenizer: written beside it.

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
    rules.find_recorded(head["rule"], file)
    moves = set(head["parameters"])
    zm = zo_wrap(
        model,
        rules.get(head["rule"], **head["hyper"]),
        seed=head["seed"],
        direction=head["direction"],
        queries=head["queries"],
        estimator=head["estimator"],
        blocks=head["blocks"],
        block_order=head["block_order"],
        trainable=lambda name, tensor: name in moves,
        quantized=head.get("quantized"),
        masters=bool(head.get("masters")),
        along=head.get("along") or "drawn",
        # A replay evaluates nothing; a weight decay is read from each record, this says that there may be one.
        weight_decay=_weight_decay(journal),
        engine="eager",
    )
    check_start(zm, journal)
    replay(zm, journal)
    if to is not None:
        base = head.get("model")
        export.save_model(model, to, {**zm.facts(), **({"base_model": base} if base else {})}, tokenizer=tokenizer)
    return zm


def _weight_decay(journal: Journal) -> float:
    return max((record.get("weight_decay", 0.0) for record in journal.records()), default=0.0)


def check_start(zm: ZOModel, journal: Journal) -> None:
    """Check that ``zm`` holds the weights that the journal's run started from.

    Raises:
        ZOError: it does not.
    """
    names = [parameter.name for parameter in zm.parameters]
    missing = set(journal.header["parameters"]) - set(names)
    if missing:
        raise ZOError(f"{journal.path} is the journal of another model: this one has no {sorted(missing)[0]} to move")
    if journal.header["weights"] != fingerprint(zm):
        raise ZOError(
            f"{journal.path} starts from other weights than this model's: load the base model that the run started "
            f"from ({journal.header.get('model') or 'its name was not recorded'}), in the same dtype"
        )
