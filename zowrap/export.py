"""Models on disk: safetensors in the Hugging Face layout, never a pickle.

A model is written into a folder beside its place and then moved there file by file. The header of every weight file
says how the weights came about (rule, steps, base model, seed); the tensors are bitwise the model's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zowrap
from zowrap import quant
from zowrap.errors import ZOError, first_line, nearest
from zowrap.files import TMP, move_into, read_json, remove, write_json, writing
from zowrap.lock import entries
from zowrap.names import DTYPES as NAMES
from zowrap.quant import convert
from zowrap.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    LABEL_VECTORS,
    SETTINGS,
    WEIGHTS,
    Path_,
    add_metadata,
    check_model,
    check_target,
    opened,
    pickled_weights,
    read_metadata,
    require_safetensors,
    weight_files,
    write_tensors,
)

__all__ = [
    "convert_pickle",
    "export_run",
    "read_metadata",
    "require_safetensors",
    "save_model",
    "saved_part",
    "weight_files",
]

# Above this a model is written in parts: what the Hub recommends, and what a small machine can load piece by piece.
MAX_SHARD_SIZE = "5GB"
DTYPES = {name: getattr(torch, name) for name in NAMES}


def saved_part(model: nn.Module) -> tuple[nn.Module, str]:
    """What of ``model`` is written, and the prefix of its names within ``model``.

    A module that only wraps one ``transformers`` or PEFT model (a task around an encoder, say) and holds no tensor of
    its own is written as that model, so that ``from_pretrained`` loads it.
    """
    prefix = ""
    while not hasattr(model, "save_pretrained"):
        children = [(name, child) for name, child in model.named_children() if _is_saved_with_it(child)]
        own = [name for name in model.state_dict() if "." not in name]
        if own or len(children) != 1 or not _has_pretrained(children[0][1]):
            return model, prefix
        prefix += children[0][0] + "."
        model = children[0][1]
    return model, prefix


def _is_saved_with_it(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) and not hasattr(module, "saved_apart")


def saved_apart(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(file, prefix of its names within ``model``, module) of what is written into files beside the model's own."""
    return [(m.saved_apart, f"{name}.", m) for name, m in model.named_modules() if hasattr(m, "saved_apart")]


def _has_pretrained(model: nn.Module) -> bool:
    return any(hasattr(child, "save_pretrained") for child in model.modules())


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
    facts = {"zowrap": zowrap.__version__, **_base_model(part), **(metadata or {})}
    with fresh_files(directory) as beside:
        with _quiet(), quant.raised(model):
            _write(part, beside, max_shard_size)
            for name, _, module in saved_apart(model):
                tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
                save_file(tensors, beside / name, metadata={"format": "pt", **getattr(module, "facts", {})})
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if (beside / ADAPTER).is_file():
            facts |= convert.base_options(part)
        _name_base_absolutely(beside)
        for file in sorted(beside.rglob("*.safetensors")):
            add_metadata(file, facts)


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
        stale = {p.name for p in directory.iterdir() if _is_part(p.name)} - {p.name for p in beside.iterdir()}
        if not any(p.suffix == ".safetensors" for p in beside.rglob("*")):
            stale = set()
        move_into(beside, directory)
        for name in stale:  # shards of a model that was split otherwise
            (directory / name).unlink()


def _is_part(name: str) -> bool:
    return name in (WEIGHTS, INDEX) or (name.startswith("model-") and name.endswith(".safetensors"))


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


def _is_a(model: nn.Module, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(model).__mro__)


def _base_model(part: nn.Module) -> dict[str, str]:
    name = model_name(part)
    return {"base_model": name} if name else {}


def model_name(model: nn.Module) -> str | None:
    """What ``model`` was loaded from, where it knows."""
    part, _ = saved_part(model)
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


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


# --- copies ------------------------------------------------------------------------------------------------------


def export_run(
    run: Path_,
    to: Path_,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    form: str = "same",
) -> list[Path]:
    """Copy the model out of a RUN, or of any model folder: weights, config, tokenizer, generation settings.

    Args:
        run: the folder; of a RUN, what its root holds (the best model by evaluation, else the last).
        to: a new or empty folder.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, rounded to nearest; by default as it is.
        max_shard_size: split the weights anew.
        metadata: strings to add to the header.
        overwrite: allow ``to`` to hold files already.
        form: ``"same"`` quantisation, ``"bf16"``, ``"fp32"``, ``"adapters"`` or ``"merged"``, see
            :mod:`zowrap.quant.convert`. The second and third are whole plain models: quantised weights are
            dequantised, adapters merged.

    Returns:
        The files written.

    Raises:
        ZOError: no weights, an unknown form or dtype, a dtype for quantised weights, ``to`` is not empty, or the disk
            is full.
    """
    run, to = Path(run), Path(to)
    convert.check_format(form)
    if form == "merged":
        return export_merged(run, to, max_shard_size, overwrite, form, metadata)[0]
    if dtype is not None and dtype not in DTYPES:
        raise ZOError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    check_target(run, to, overwrite)
    check_model(run)
    if dtype is not None and convert.is_quantized_folder(run):
        raise ZOError(
            f"{run} is quantised, and a dtype would round its scales too: --format bf16 or fp32 makes it a plain model"
        )
    if form in convert.DTYPES and (run / ADAPTER).is_file():
        return export_merged(run, to, max_shard_size, overwrite, form, metadata)[0]
    with fresh_files(to) as beside:
        _write_copy(run, beside, form, DTYPES.get(dtype or ""), max_shard_size)
        for file in sorted(beside.glob("*.safetensors")) if metadata else []:
            add_metadata(file, metadata or {})
    return [p for p in entries(to) if p.is_file()]


def _write_copy(run: Path, to: Path, form: str, dtype: torch.dtype | None, max_shard_size: int | str | None) -> None:
    if form == "adapters":
        return convert.copy_adapters(run, to)
    _copy_settings(run, to)
    if form != "same" and convert.is_quantized_folder(run):
        convert.write_dequantized(run, to, form, max_shard_size or MAX_SHARD_SIZE)
    elif form == "same" and dtype is None and max_shard_size is None:
        for file in _weights_and_index(run):
            shutil.copyfile(file, to / file.name)
    else:
        _rewrite(run, to, convert.DTYPES.get(form, dtype), max_shard_size or MAX_SHARD_SIZE)


def export_merged(
    run: Path_,
    to: Path_,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    form: str = "merged",
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[Path], dict[str, float]]:
    """Write the base of a RUN's adapters with them merged in, in the base's own precision, ``"bf16"`` or ``"fp32"``.

    Returns:
        The files written, and for each layer the part of its change that rounding took.

    Raises:
        ZOError: there are no adapters, ``form`` is ``"merged"`` and the base is 4-bit, or ``to`` is not empty.
    """
    run, to = Path(run), Path(to)
    check_target(run, to, overwrite)
    model, errors = convert.merged(run, form)
    with fresh_files(to) as beside:
        _copy_settings(run, beside)
        for name in ("adapter_config.json", "config.json"):
            (beside / name).unlink(missing_ok=True)
        with _quiet():
            _write(model, beside, max_shard_size or MAX_SHARD_SIZE)
        for file in sorted(beside.glob("*.safetensors")):
            add_metadata(file, {"zowrap": zowrap.__version__, **_facts_of(run), **(metadata or {})})
    return [p for p in entries(to) if p.is_file()], errors


def _facts_of(run: Path) -> dict[str, str]:
    """What the header of a folder's weights says of how they came about, less what is of their form."""
    facts = read_metadata(weight_files(run)[0])
    return {name: value for name, value in facts.items() if name not in ("format", "base_options")}


def convert_pickle(model_dir: Path_, to: Path_, overwrite: bool = False) -> list[Path]:
    """Copy a model folder whose weights are pickled, with the weights as safetensors.

    The pickle is read by ``torch.load(weights_only=True)``, which admits tensors and plain containers and nothing
    that runs code.

    Raises:
        ZOError: no pickled weights, one that holds anything else than named tensors, or a full disk.
    """
    source, to = Path(model_dir), Path(to)
    if not source.is_dir():
        raise ZOError(f"{source} is not a folder with a model")
    check_target(source, to, overwrite)
    pickles = pickled_weights(source)
    if not pickles:
        raise ZOError(f"{source} holds no pickled weights to convert")
    adapter = pickles[0].name.startswith("adapter_model")
    tensors: dict[str, Tensor] = {}
    for file in pickles:
        if file.name.startswith("adapter_model") == adapter:
            tensors.update(_unpickle(file))
    with fresh_files(to) as beside:
        _copy_settings(source, beside)
        facts = {"format": "pt", "zowrap": zowrap.__version__, "converted_from": pickles[0].name}
        if adapter:
            write_tensors(tensors, beside, ADAPTER, None, facts)
        else:
            write_tensors(tensors, beside, WEIGHTS, MAX_SHARD_SIZE, facts)
    return [p for p in entries(to) if p.is_file()]


def _unpickle(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].rstrip(". ")
        raise ZOError(f"{file} holds more than tensors, and loading that could run code: refused ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ZOError(f"{file} cannot be read as weights: {first_line(error)}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ZOError(f"{file} is not a state dict: it holds other things than named tensors")
    # Copies of tied weights keep every name loadable; a pickle may also hold a small view of a large storage.
    return {str(name): tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


# What a RUN's folder holds beside the model.
_OF_THE_RUN = {"zowrap.json", "journal.jsonl", "metrics.jsonl", "training_args.json", "trainer_state.json"}
_OF_THE_RUN |= {"zo_state.json", "all_results.json", "train_results.json", "eval_results.json"}


def _copy_settings(source: Path, to: Path) -> None:
    for file in sorted(source.iterdir()):
        kept = file.suffix in SETTINGS and file.name not in _OF_THE_RUN and not file.name.endswith(".index.json")
        kept |= file.name == LABEL_VECTORS
        if file.is_file() and kept:
            shutil.copyfile(file, to / file.name)


def _weights_and_index(run: Path) -> list[Path]:
    index = [run / INDEX] if (run / INDEX).is_file() else []
    return weight_files(run) + index


def _rewrite(run: Path, to: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    tensors: dict[str, Tensor] = {}
    files = weight_files(run)
    for file in files:
        with opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                tensor = stored.get_tensor(name)
                tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    adapter = files[0].name == ADAPTER
    write_tensors(tensors, to, files[0].name if adapter else WEIGHTS, None if adapter else max_shard_size,
                   {"format": "pt", **read_metadata(files[0])})  # fmt: skip
    config = to / "config.json"
    if dtype is not None and config.is_file():
        settings = read_json(config)
        settings.pop("torch_dtype", None)
        write_json(config, {**settings, "dtype": str(dtype).removeprefix("torch.")})
