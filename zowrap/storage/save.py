"""Save live models as safetensors in the Hugging Face layout, never as a pickle.

A model is written into a temporary folder and then moved into place file by file. The header of every weight file
records how the weights were trained (rule, steps, base model, seed); the tensors equal the model's bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.quant import lowering
from zowrap.step.pretrained import _base_model, _is_a, saved_part
from zowrap.storage.atomic import TMP, guard_write, move_into, read_json, remove, write_json
from zowrap.storage.base_options import describe_base
from zowrap.storage.encoder_files import copy_modules
from zowrap.storage.safetensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    LABEL_VECTORS,
    SETTINGS,
    WEIGHTS,
    StrPath,
    adapters_folder,
    add_metadata,
)
from zowrap.version import __version__

# Larger models are split: the Hub recommends this size, and a small machine can load such shards one by one.
MAX_SHARD_SIZE = "5GB"


def separate_parts(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """List (file, prefix of its names in ``model``, module) for the modules that are saved in files of their own."""
    return [(m.separate_file, f"{name}.", m) for name, m in model.named_modules() if hasattr(m, "separate_file")]


def save_model(
    model: nn.Module,
    directory: StrPath,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    tokenizer: Any = None,
) -> None:
    """Write ``model`` so that ``from_pretrained`` loads it.

    Args:
        model: a ``transformers`` model (weights, config, generation settings; tied weights once), a PEFT model (its
            adapter), a module that wraps one of these, or any module (``model.safetensors`` from its state dict). A
            submodule with an attribute ``separate_file`` is written to the file of that name, and the JSON files that
            one has in ``folder_documents`` beside it.
        directory: created if needed; files of the same names are replaced, others stay.
        metadata: strings for the header of the weight files, in addition to ``zowrap`` (the version) and
            ``base_model``.
        max_shard_size: bytes, or a string such as ``"5GB"``.
        tokenizer: anything with ``save_pretrained``, saved to the same folder.

    Raises:
        ZOError: the disk is full (``directory`` is then unchanged), or ``directory`` cannot be written.
    """
    directory = Path(directory)
    part, _ = saved_part(model)
    facts = {"zowrap": __version__, **_base_model(part), **(metadata or {})}
    with replace_files(directory) as beside:
        with hide_progress_bars(), lowering.original_layers(model):
            write_weights(part, beside, max_shard_size)
            for name, _, module in separate_parts(model):
                write_separate_part(module, beside / name)
            write_documents(model, beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if any(beside.rglob(ADAPTER)):  # of an adapter with a name of its own in a folder of that name
            facts |= describe_base(part)
        _name_base_absolutely(beside)
        for file in sorted(beside.rglob("*.safetensors")):
            add_metadata(file, facts)


def write_separate_part(module: nn.Module, file: Path) -> None:
    """Write a module into a file of its own, with its ``facts`` in the header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    save_file(tensors, file, metadata={"format": "pt", **getattr(module, "facts", {})})


def write_documents(model: nn.Module, directory: Path) -> None:
    """Write the JSON files that modules of ``model`` have in ``folder_documents``: path → content."""
    for module in model.modules():
        for path, value in getattr(module, "folder_documents", {}).items():
            write_json(directory / path, value)


def save_settings(model: nn.Module, directory: StrPath, tokenizer: Any = None) -> None:
    """Write everything except the weights: configuration, generation settings, tokenizer."""
    directory = Path(directory)
    part, _ = saved_part(model)
    holders: list[Any]
    # A folder of adapters must have no config.json: with one, transformers would look for a full model in it.
    plain = _is_a(part, "PreTrainedModel") and not getattr(part, "_hf_peft_config_loaded", False)
    if isinstance(getattr(part, "peft_config", None), dict) and not plain:
        adapters: Any = part.peft_config
        holders = [adapters[name] for name in adapters if name == "default"]
    else:
        holders = [getattr(part, "config", None)]
        if callable(getattr(part, "can_generate", None)) and part.can_generate():  # type: ignore[operator]
            holders.append(getattr(part, "generation_config", None))
    with replace_files(directory) as beside:
        for holder in (*holders, tokenizer):
            if hasattr(holder, "save_pretrained"):
                holder.save_pretrained(str(beside))  # type: ignore[union-attr]
        write_documents(model, beside)
        _name_base_absolutely(beside)


def _name_base_absolutely(folder: Path) -> None:
    """Make the path of a local base absolute in adapters' configurations, so that it is found from any folder."""
    for file in folder.rglob(ADAPTER_CONFIG):
        config = read_json(file)
        base = config.get("base_model_name_or_path")
        if base and Path(base).is_dir():
            write_json(file, {**config, "base_model_name_or_path": str(Path(base).absolute())})


@contextmanager
def replace_files(directory: Path):
    """Yield a temporary folder; on leaving, its files replace those of ``directory``."""
    existed = directory.is_dir()
    if directory.exists() and not existed:
        raise ZOError(f"{directory} is a file: give the name of a folder")
    beside = directory / ("model" + TMP)
    with guard_write(directory, beside, *([] if existed else [directory])):
        remove(beside)
        beside.mkdir(parents=True)
        yield beside
        new = {p.name for p in beside.iterdir()}
        stale = {p.name for p in directory.iterdir() if _is_weight_file(p.name)} - new
        if any(beside.rglob(ADAPTER)):  # with a config.json, transformers would look for a full model
            stale |= {"config.json"} - new
        if not any(p.suffix == ".safetensors" for p in beside.rglob("*")):
            stale = set()
        move_into(beside, directory)
        for name in stale:  # of another model that was here, or of one with other shards
            (directory / name).unlink(missing_ok=True)


def _is_weight_file(name: str) -> bool:
    """Whether a file holds weights or says how to load them, so that it must go when another model replaces it."""
    whole = name in (WEIGHTS, INDEX, ADAPTER, ADAPTER_CONFIG, LABEL_VECTORS)
    return whole or (name.startswith("model-") and name.endswith(".safetensors"))


def write_weights(part: nn.Module, directory: Path, max_shard_size: int | str) -> None:
    if _is_a(part, "PreTrainedModel"):
        with _skip_irreversible_conversions(part):
            state = _copy_shared_by_hand(part)
            options = {} if state is None else {"state_dict": state}
            part.save_pretrained(str(directory), max_shard_size=max_shard_size, **options)  # type: ignore[operator]
    elif hasattr(part, "save_pretrained"):
        part.save_pretrained(str(directory))  # type: ignore[operator]
    else:
        from safetensors.torch import save_model as save_module

        save_module(part, str(directory / WEIGHTS), metadata={"format": "pt"})


def _copy_shared_by_hand(model: nn.Module) -> dict[str, Any] | None:
    """Return the model's state with a copy of each weight that a script shared, or None where there is none.

    transformers writes a shared tensor once, and shares it again on loading only where the model's class and
    configuration say so. Elsewhere one of its places would come back random, or saving would fail.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        return None
    declared = set(getattr(model, "all_tied_weights_keys", None) or {})
    state, copied = model.state_dict(), False
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.numel():
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        other = first.setdefault(place, name)
        if other != name and not declared & {name, other}:
            state[name], copied = tensor.clone(), True
    return state if copied else None


@contextmanager
def _skip_irreversible_conversions(model: nn.Module):
    """Hide while inside the weight conversions of ``model`` that have no inverse.

    transformers reverses on saving all conversions that it made on loading, and fails for those of a quantised
    checkpoint. They need no inverse: quantised layers write the tensors of the file themselves.
    """
    said = model.__dict__.get("_weight_conversions")
    if said:
        model.__dict__["_weight_conversions"] = [each for each in said if _is_reversible(each)]
    try:
        yield
    finally:
        if said:
            model.__dict__["_weight_conversions"] = said


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


@contextmanager
def hide_progress_bars():
    """Hide while inside the progress bar that transformers draws for each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# The files of a RUN's folder that do not belong to the model.
_RUN_FILES = {"zowrap.json", "journal.jsonl", "metrics.jsonl", "training_args.json", "trainer_state.json"}
_RUN_FILES |= {"zo_state.json", "all_results.json", "train_results.json", "eval_results.json", "before.json"}


def copy_settings(source: Path, to: Path) -> None:
    """Copy everything of a model folder but its weights; of a sentence encoder the modules that follow it, whole."""
    for file in sorted(source.iterdir()):
        kept = file.suffix in SETTINGS and file.name not in _RUN_FILES and not file.name.endswith(".index.json")
        kept |= file.name == LABEL_VECTORS
        if file.is_file() and kept:
            shutil.copyfile(file, to / file.name)
    settings = adapters_folder(source) / ADAPTER_CONFIG  # of adapters with a name of their own, which they lose here
    if settings.is_file():
        shutil.copyfile(settings, to / ADAPTER_CONFIG)
    copy_modules(source, to)
