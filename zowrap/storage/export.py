"""Copy a model out of a RUN or another folder, converting its precision or taking only its adapters if asked."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zowrap.errors import ZOError, nearest
from zowrap.numerics.dtypes import DTYPES
from zowrap.storage import formats
from zowrap.storage.atomic import read_json, write_json
from zowrap.storage.dequantize import is_quantized_folder, write_dequantized
from zowrap.storage.encoder_files import MODULES, PROMPTS, TRANSFORMER, copy_modules
from zowrap.storage.lock import list_entries
from zowrap.storage.merge import export_merged
from zowrap.storage.safetensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    LABEL_VECTORS,
    WEIGHTS,
    Load,
    StrPath,
    adapter_file,
    adapters_folder,
    add_metadata,
    check_model,
    check_target,
    open_safetensors,
    read_metadata,
    weight_files,
    write_tensors,
)
from zowrap.storage.save import MAX_SHARD_SIZE, copy_settings, replace_files


def export_run(
    run: StrPath,
    to: StrPath,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    form: str = "same",
    load: Load | None = None,
) -> list[Path]:
    """Copy the model out of a RUN, or of any model folder: weights, config, tokenizer, generation settings.

    Args:
        run: the folder. A RUN's own folder holds its best model by evaluation, or else its last.
        to: a new or empty folder.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, rounded to nearest; by default unchanged.
        max_shard_size: split the weights into new shards of at most this size.
        metadata: strings to add to the header of the weight files.
        overwrite: allow files in ``to``.
        form: one of :data:`zowrap.names.FORMATS`. ``"same"`` keeps the quantisation; ``"bf16"`` and ``"fp32"`` write a
            plain model, with quantised weights dequantised and adapters merged; ``"adapters"`` writes the adapters
            only; ``"merged"`` merges them in the base's own precision.
        load: loads the model of a folder of adapters, to merge them: :func:`zowrap.tasks.adapted.load_adapted`.

    Returns:
        All files in ``to``.

    Raises:
        ZOError: there are no weights, the form or dtype is unknown, a dtype was given for quantised weights, ``to`` is
            not empty, or the disk is full.
    """
    run, to = Path(run), Path(to)
    formats.check_format(form)
    if form == "merged":
        return export_merged(run, to, load, max_shard_size, overwrite, form, metadata)[0]
    if dtype is not None and dtype not in DTYPES:
        raise ZOError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    check_target(run, to, overwrite)
    check_model(run)
    if dtype is not None and is_quantized_folder(run):
        raise ZOError(
            f"{run} is quantised, and --dtype would round its scales too: use --format bf16 or fp32 for a plain model"
        )
    if form in formats.DTYPES and adapter_file(run).is_file():
        return export_merged(run, to, load, max_shard_size, overwrite, form, metadata)[0]
    with replace_files(to) as beside:
        _write_copy(run, beside, form, DTYPES.get(dtype or ""), max_shard_size)
        for file in sorted(beside.glob("*.safetensors")) if metadata else []:
            add_metadata(file, metadata or {})
    return [p for p in list_entries(to) if p.is_file()]


def _write_copy(run: Path, to: Path, form: str, dtype: torch.dtype | None, max_shard_size: int | str | None) -> None:
    if form == "adapters":
        return copy_adapters(run, to)
    copy_settings(run, to)
    if form != "same" and is_quantized_folder(run):
        write_dequantized(run, to, form, max_shard_size or MAX_SHARD_SIZE)
    elif form == "same" and dtype is None and max_shard_size is None:
        for file in _weights_and_index(run):
            shutil.copyfile(file, to / file.name)
    else:
        _convert(run, to, formats.DTYPES.get(form, dtype), max_shard_size or MAX_SHARD_SIZE)


def _weights_and_index(run: Path) -> list[Path]:
    index = [run / INDEX] if (run / INDEX).is_file() else []
    return weight_files(run) + index


def _convert(run: Path, to: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    tensors: dict[str, Tensor] = {}
    files = weight_files(run)
    for file in files:
        with open_safetensors(file) as stored:
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


def copy_adapters(folder: StrPath, to: Path) -> None:
    """Copy the adapters of a folder: their weights and their configuration, and of a sentence encoder its modules.

    Raises:
        ZOError: there are none.
    """
    for name in (ADAPTER, ADAPTER_CONFIG):
        file = adapters_folder(folder) / name
        if not file.is_file():
            raise ZOError(f"{folder} holds no adapters: it has no {name}")
        shutil.copyfile(file, to / name)
    for name in (LABEL_VECTORS, MODULES, PROMPTS, *TRANSFORMER):
        if (Path(folder) / name).is_file():
            shutil.copyfile(Path(folder) / name, to / name)
    copy_modules(Path(folder), to)
