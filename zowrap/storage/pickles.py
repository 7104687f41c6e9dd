"""Convert pickled weights to safetensors without running any code in them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zowrap.errors import ZOError, first_line
from zowrap.storage.encoder_files import pickled_modules
from zowrap.storage.lock import list_entries
from zowrap.storage.safetensors import (
    ADAPTER,
    INDEX,
    WEIGHTS,
    StrPath,
    check_target,
    pickled_weights,
    weight_files,
    write_tensors,
)
from zowrap.storage.save import MAX_SHARD_SIZE, copy_settings, replace_files
from zowrap.version import __version__


def convert_pickle(model_dir: StrPath, to: StrPath, overwrite: bool = False) -> list[Path]:
    """Copy a model folder whose weights, or those of a sentence encoder's modules, are pickled, as safetensors.

    The pickle is read by ``torch.load(weights_only=True)``, which accepts only tensors and plain containers and runs no
    code.

    Raises:
        ZOError: there are no pickled weights, a pickle holds anything but named tensors, or the disk is full.
    """
    source, to = Path(model_dir), Path(to)
    if not source.is_dir():
        raise ZOError(f"{source} is not a folder with a model")
    check_target(source, to, overwrite)
    whole, modules = weight_files(source), pickled_modules(source)
    pickles = [] if whole and modules else pickled_weights(source)
    if not pickles and not modules:
        raise ZOError(f"{source} holds no pickled weights to convert")
    adapter = bool(pickles) and pickles[0].name.startswith("adapter_model")
    tensors: dict[str, Tensor] = {}
    for file in pickles:
        if file.name.startswith("adapter_model") == adapter:
            tensors.update(_unpickle(file))
    converted = {file.parent.relative_to(source): _unpickle(file) for file in modules}
    with replace_files(to) as beside:
        copy_settings(source, beside)
        facts = {"format": "pt", "zowrap": __version__, "converted_from": (pickles or modules)[0].name}
        for folder, weights in converted.items():
            (beside / folder).mkdir(parents=True, exist_ok=True)
            write_tensors(weights, beside / folder, WEIGHTS, None, facts)
        if not pickles:
            for file in (*whole, *([source / INDEX] if (source / INDEX).is_file() else [])):
                shutil.copyfile(file, beside / file.name)
        elif adapter:
            write_tensors(tensors, beside, ADAPTER, None, facts)
        else:
            write_tensors(tensors, beside, WEIGHTS, MAX_SHARD_SIZE, facts)
    return [p for p in list_entries(to) if p.is_file()]


def _unpickle(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].rstrip(". ")
        raise ZOError(
            f"{file} was refused: it holds more than tensors, so loading it could run code ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ZOError(f"{file} cannot be read as weights: {first_line(error)}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ZOError(f"{file} is not a state dict: it holds objects other than named tensors")
    # Clone, so that tied weights are saved under every name, and a small view does not keep a large storage.
    return {str(name): tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}
