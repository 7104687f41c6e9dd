"""Read, write and check the safetensors files of a model folder, and recognise pickles."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from zowrap.errors import ZOError
from zowrap.storage.atomic import TMP, guard_write, is_same_place, read_json, write_json
from zowrap.storage.folder import RunFolder
from zowrap.storage.lock import list_entries

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[str | os.PathLike[str]], Any]  # a folder of adapters → its model
StrPath = str | os.PathLike[str]

WEIGHTS, ADAPTER, ADAPTER_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
INDEX = WEIGHTS + ".index.json"
LABEL_VECTORS = "label_vectors.safetensors"  # the label vectors that a classification adds to an encoder
START_VECTORS = "start_vectors.safetensors"  # the label vectors that a run began with
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLED_WEIGHTS = ("pytorch_model", "adapter_model", "model", "consolidated")
# The other files of a model folder: configuration, tokenizer, code, notes.
SETTINGS = (".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken", ".spm", ".vocab")

# --- the header of a safetensors file ----------------------------------------------------------------------------
# Eight bytes: the header's length, little endian. The header: JSON, ``__metadata__`` a map of strings. Then the data.


@contextmanager
def open_safetensors(file: StrPath) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ZOError: the file is empty, truncated or not a safetensors file.
    """
    try:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ZOError(
            f"{os.fspath(file)} is not a complete safetensors file ({reason}): download or export it again"
        ) from error


def read_metadata(file: StrPath) -> dict[str, str]:
    """Read ``__metadata__`` from the header of a safetensors file."""
    with open_safetensors(file) as tensors:
        return dict(tensors.metadata() or {})


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add strings to the header of a safetensors file; the tensors' bytes do not change."""
    beside = file.with_name(file.name + TMP)
    with guard_write(file, beside), open(file, "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        header["__metadata__"] = {**header.get("__metadata__", {}), **{k: str(v) for k, v in metadata.items()}}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight bytes
        with open(beside, "wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, target, 16 * 2**20)
        os.replace(beside, file)


def read_shapes(file: StrPath) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        ZOError: as :func:`open_safetensors`.
    """
    with open_safetensors(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no dict)


# --- model folders -----------------------------------------------------------------------------------------------


def named_adapters(directory: StrPath) -> list[Path]:
    """List the folders inside a model's folder that peft saved adapters to, which are not named ``default``."""
    directory = Path(directory).expanduser()
    return [each for each in sorted(directory.iterdir()) if _is_named_adapter(each)] if directory.is_dir() else []


def _is_named_adapter(folder: Path) -> bool:
    """Whether a folder is one that peft saved an adapter to, and not a checkpoint or a run."""
    own = (folder / ADAPTER).is_file() and (folder / ADAPTER_CONFIG).is_file()
    return own and not re.fullmatch(r"checkpoint-\d+", folder.name) and not (folder / "zowrap.json").is_file()


def adapters_folder(directory: StrPath) -> Path:
    """The folder that holds the adapters of a model's folder: itself, or the only one inside it that does."""
    directory = Path(directory).expanduser()
    if any((directory / name).is_file() for name in (ADAPTER, ADAPTER_CONFIG, "config.json", WEIGHTS, INDEX)):
        return directory
    inside = named_adapters(directory)
    return inside[0] if len(inside) == 1 else directory


def adapter_file(directory: StrPath) -> Path:
    """The file of the adapters of a model's folder, whether it is there or not."""
    return adapters_folder(directory) / ADAPTER


def _check_one_adapter(directory: Path) -> None:
    """Raise :class:`ZOError` for a folder that holds several adapters, none of which is the model's."""
    inside = named_adapters(directory)
    if len(inside) > 1 and not weight_files(directory):
        names = ", ".join(each.name for each in inside)
        raise ZOError(f"{directory} holds several adapters ({names}): give the folder of one, such as {inside[0]}")


def adapters_base(directory: StrPath) -> str | None:
    """The base model that a folder of adapters names; None for any other folder."""
    file = adapters_folder(directory) / ADAPTER_CONFIG
    named = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    return named if named and not (Path(directory) / "config.json").is_file() else None


def check_adapter_settings(directory: StrPath) -> None:
    """Refuse adapters whose settings name code: peft imports the module that ``megatron_core`` names.

    Raises:
        ZOError: ``adapter_config.json`` names a module to import, or asks for remote code.
    """
    file = adapters_folder(directory) / ADAPTER_CONFIG
    if not file.is_file():
        return
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ZOError(f"{file} is damaged: it holds no JSON object")
    if settings.get("megatron_config") is not None or settings.get("megatron_core") not in (None, _MEGATRON):
        raise ZOError(
            f"{file} names a module to import (megatron_config, megatron_core), and zowrap imports nothing that a "
            f"folder names: remove these two entries if the adapters are yours"
        )
    if _asks_for_remote_code(settings):
        raise ZOError(
            f"{file} asks for trust_remote_code, which a folder may not: remove the entry if the adapters are yours"
        )


_MEGATRON = "megatron.core"  # peft's default, which it writes into every configuration and imports for none


def _asks_for_remote_code(settings: Any) -> bool:
    """Whether ``trust_remote_code`` is set anywhere in the settings."""
    if isinstance(settings, list):
        return any(map(_asks_for_remote_code, settings))
    if not isinstance(settings, dict):
        return False
    return bool(settings.get("trust_remote_code")) or any(map(_asks_for_remote_code, settings.values()))


def weight_files(directory: StrPath) -> list[Path]:
    """List the safetensors files of a model folder: a single file, the shards that the index names, or an adapter."""
    directory = Path(directory)
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ZOError(f"{directory} is incomplete: {missing[0]}, which {INDEX} names, is missing")
        return [directory / name for name in names]
    return [file for file in (directory / WEIGHTS, adapter_file(directory)) if file.is_file()][:1]


def pickled_weights(directory: StrPath) -> list[Path]:
    """List the weight files of a model folder that are pickles."""
    found = (p for p in Path(directory).iterdir() if p.is_file() and p.suffix in PICKLES)
    return sorted(p for p in found if p.name.startswith(PICKLED_WEIGHTS))


def require_safetensors(model_dir: StrPath, whole: bool = True) -> None:
    """Check that a local folder holds weights that can be loaded without running code in them.

    Args:
        whole: also open each file, which imports torch.

    Raises:
        ZOError: there are no weights, they are damaged, or they are all pickled (the message has the command that
            converts them).
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ZOError(f"{directory} is not a folder with a model")
    check_adapter_settings(directory)
    files = weight_files(directory) or list(directory.glob("*.safetensors"))
    for file in files if whole else ():
        with open_safetensors(file):
            pass
    if files:
        return
    pickles = pickled_weights(directory)
    if pickles:
        raise ZOError(
            f"{directory} holds its weights only as a pickle ({pickles[0].name}), which can run code when loaded: "
            f"convert it once with zowrap export {directory} --to DIR --allow-pickle"
        )
    raise ZOError(f"{directory} holds no weights: it has no {WEIGHTS}")


def check_model(run: StrPath, whole: bool = True) -> None:
    """Raise :class:`ZOError` unless a RUN or another folder holds a model; ``whole`` as in require_safetensors."""
    run = Path(run)
    _check_one_adapter(run)
    if (run / "zowrap.json").is_file() and not weight_files(run):
        reason = RunFolder(run).failure()
        if reason:
            raise ZOError(f"{run} holds no tuned model, because its run failed: {reason}")
        raise ZOError(f"{run} holds no finished model yet: resume its training, or export one of its checkpoints")
    require_safetensors(run, whole)


def check_target(source: Path, to: Path, overwrite: bool) -> None:
    """Raise :class:`ZOError` unless a model of the folder ``source`` can be written to the folder ``to``."""
    if to.exists() and not to.is_dir():
        raise ZOError(f"{to} is a file: give the name of a folder")
    if is_same_place(to, source):
        raise ZOError(f"{to} is the folder to copy from: give another one")
    if list_entries(to) and not overwrite:
        raise ZOError(f"{to} is not empty: give a new folder, or add --overwrite")


def check_directory(name: str, weights: bool = True, whole: bool = True) -> None:
    """Raise :class:`ZOError` unless ``name`` can be a model's folder or its name on the hub.

    Args:
        weights: require weights in a folder.
        whole: as in :func:`require_safetensors`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        check_adapter_settings(path)
        _check_one_adapter(path)
        if not (path / "config.json").is_file() and adapters_base(path) is None:
            raise ZOError(f"{name} is not a model directory: it has no config.json")
        if weights:
            require_safetensors(path, whole)
    elif path.exists():
        raise ZOError(f"{name} is a file: give the model's directory, or its name on the hub")
    elif not could_be_hub_name(name):
        raise ZOError(f"no such model directory: {name}")


def could_be_hub_name(name: str) -> bool:
    """Whether ``name`` has the form of a model's name on the hub."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def write_tensors(
    tensors: dict[str, Tensor], to: Path, name: str, max_shard_size: int | str | None, metadata: dict[str, str]
) -> None:
    """Write tensors as one file if ``max_shard_size`` is None, else in shards of at most that size with an index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if max_shard_size is None:
        save_file(tensors, to / name, metadata=metadata)
        return
    stem, ending = os.path.splitext(name)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=stem + "{suffix}" + ending, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        save_file({n: tensors[n].contiguous() for n in names}, to / file, metadata=metadata)
    if split.is_sharded:
        write_json(to / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
