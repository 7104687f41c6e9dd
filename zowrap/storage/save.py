"""Live models to disk: safetensors in the Hugging Face layout, never a pickle.

A model is written into a folder beside its place and then moved there file by file. The header of every weight file
says how the weights came about (rule, steps, base model, seed); the tensors are bitwise the model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from zowrap.errors import ZOError
from zowrap.quant import lowering
from zowrap.step.pretrained import _base_model, _is_a, saved_part
from zowrap.storage.atomic import TMP, move_into, read_json, remove, write_json, writing
from zowrap.storage.base_options import base_options
from zowrap.storage.safetensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    LABEL_VECTORS,
    SETTINGS,
    WEIGHTS,
    Path_,
    add_metadata,
)
from zowrap.version import __version__

# Above this a model is written in parts: what the Hub recommends, and what a small machine can load piece by piece.
MAX_SHARD_SIZE = "5GB"


def saved_apart(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(file, prefix of its names within ``model``, module) of what is written into files beside the model's own."""
    return [(m.saved_apart, f"{name}.", m) for name, m in model.named_modules() if hasattr(m, "saved_apart")]


def save_model(
    model: nn.Module,
    directory: Path_,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tokenizer: Any = None,
) -> None:
    """Write ``model`` so that ``from_pretrained`` loads it.

    Args:
        model: a ``transformers`` model (weights, config, generation settings; tied weights once), a PEFT model (its
            adapter), a module that wraps one of these, or any module (``model.safetensors`` from its state dict). What
            says ``saved_apart`` is written into the file of that name.
        directory: made if it is not there; files of the same names are replaced, others stay.
        metadata: strings for the header of the weight files, beside ``zowrap`` (the version) and ``base_model``.
        max_shard_size: bytes, or a string such as ``"5GB"``.
        tokenizer: anything with ``save_pretrained``, written beside.

    Raises:
        ZOError: the disk is full (``directory`` is then as it was), or cannot be written.
    """
    directory = Path(directory)
    part, _ = saved_part(model)
    facts = {"zowrap": __version__, **_base_model(part), **(metadata or {})}
    with fresh_files(directory) as beside:
        with _quiet(), lowering.original_layers(model):
            _write(part, beside, max_shard_size)
            for name, _, module in saved_apart(model):
                write_apart(module, beside / name)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if (beside / ADAPTER).is_file():
            facts |= base_options(part)
        _name_base_absolutely(beside)
        for file in sorted(beside.rglob("*.safetensors")):
            add_metadata(file, facts)


def write_apart(module: nn.Module, file: Path) -> None:
    """Write a module that is saved apart into a file of its own, with its facts in the header."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", **getattr(module, "facts", {})})


def save_settings(model: nn.Module, directory: Path_, tokenizer: Any = None) -> None:
    """Write everything but the weights: configuration, generation settings, tokenizer."""
    directory = Path(directory)
    part, _ = saved_part(model)
    holders: list[Any]
    # A folder of adapters has no config.json: with one, transformers would look for a whole model in it.
    plain = _is_a(part, "PreTrainedModel") and not getattr(part, "_hf_peft_config_loaded", False)
    if isinstance(getattr(part, "peft_config", None), dict) and not plain:
        adapters: Any = part.peft_config
        holders = [adapters[name] for name in adapters if name == "default"]
    else:
        holders = [getattr(part, "config", None)]
        if callable(getattr(part, "can_generate", None)) and part.can_generate():  # type: ignore[operator]
            holders.append(getattr(part, "generation_config", None))
    with fresh_files(directory) as beside:
        for holder in (*holders, tokenizer):
            if hasattr(holder, "save_pretrained"):
                holder.save_pretrained(str(beside))  # type: ignore[union-attr]
        _name_base_absolutely(beside)


def _name_base_absolutely(folder: Path) -> None:
    """Of adapters on a local base: name it so that it is found from any folder."""
    for file in folder.rglob(ADAPTER_CONFIG):
        config = read_json(file)
        base = config.get("base_model_name_or_path")
        if base and Path(base).is_dir():
            write_json(file, {**config, "base_model_name_or_path": str(Path(base).absolute())})


@contextmanager
def fresh_files(directory: Path):
    """A folder to write into; its files replace those of ``directory`` once all are written."""
    existed = directory.is_dir()
    if directory.exists() and not existed:
        raise ZOError(f"{directory} is a file: give the name of a folder")
    beside = directory / ("model" + TMP)
    with writing(directory, beside, *([] if existed else [directory])):
        remove(beside)
        beside.mkdir(parents=True)
        yield beside
        new = {p.name for p in beside.iterdir()}
        stale = {p.name for p in directory.iterdir() if _is_part(p.name)} - new
        if ADAPTER in new:  # with a config.json transformers would look for a whole model
            stale |= {"config.json"} - new
        if not any(p.suffix == ".safetensors" for p in beside.rglob("*")):
            stale = set()
        move_into(beside, directory)
        for name in stale:  # of another model that lay here, or of one that was split otherwise
            (directory / name).unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    """Whether a file is of a model's weights, or says how to load them: it goes when another model takes its place."""
    whole = name in (WEIGHTS, INDEX, ADAPTER, ADAPTER_CONFIG, LABEL_VECTORS)
    return whole or (name.startswith("model-") and name.endswith(".safetensors"))


def _write(part: nn.Module, directory: Path, max_shard_size: int | str) -> None:
    if _is_a(part, "PreTrainedModel"):
        with _undoable_alone(part):
            part.save_pretrained(str(directory), max_shard_size=max_shard_size)  # type: ignore[operator]
    elif hasattr(part, "save_pretrained"):
        part.save_pretrained(str(directory))  # type: ignore[operator]
    else:
        from safetensors.torch import save_model as save_module

        save_module(part, str(directory / WEIGHTS), metadata={"format": "pt"})


@contextmanager
def _undoable_alone(model: nn.Module):
    """Inside, of the changes that reading made to a checkpoint's tensors the model recalls those that can be undone.

    transformers undoes them all on saving, and fails at a quantised checkpoint's, which have no inverse. They need
    none: quantised layers write the tensors of the file themselves.
    """
    said = model.__dict__.get("_weight_conversions")
    if said:
        model.__dict__["_weight_conversions"] = [each for each in said if _can_be_undone(each)]
    try:
        yield
    finally:
        if said:
            model.__dict__["_weight_conversions"] = said


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


@contextmanager
def _quiet():
    """Without the progress bar that transformers draws around each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# What a RUN's folder holds beside the model.
_OF_THE_RUN = {"zowrap.json", "journal.jsonl", "metrics.jsonl", "training_args.json", "trainer_state.json"}
_OF_THE_RUN |= {"zo_state.json", "all_results.json", "train_results.json", "eval_results.json", "before.json"}


def _copy_settings(source: Path, to: Path) -> None:
    for file in sorted(source.iterdir()):
        kept = file.suffix in SETTINGS and file.name not in _OF_THE_RUN and not file.name.endswith(".index.json")
        kept |= file.name == LABEL_VECTORS
        if file.is_file() and kept:
            shutil.copyfile(file, to / file.name)
