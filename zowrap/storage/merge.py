"""Merge the adapters of a folder into their base, and write the result as a full model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.quant import lowering
from zowrap.storage.formats import DTYPES
from zowrap.storage.lock import list_entries
from zowrap.storage.safetensors import Load, StrPath, add_metadata, check_target, read_metadata, weight_files
from zowrap.storage.save import MAX_SHARD_SIZE, copy_settings, hide_progress_bars, replace_files, write_weights
from zowrap.storage.tokenizers import find_tokenizer, load_tokenizer
from zowrap.version import __version__


def export_merged(
    run: StrPath,
    to: StrPath,
    load: Load | None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    form: str = "merged",
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[Path], dict[str, float]]:
    """Write the base of a RUN's adapters with the adapters merged in.

    Args:
        load: loads the model of a folder of adapters: :func:`zowrap.tasks.adapted.load_adapted`.
        form: ``"merged"`` (the base's own precision), ``"bf16"`` or ``"fp32"``.

    Returns:
        All files in ``to``, and for each layer the relative error that rounding makes in its change.

    Raises:
        ZOError: there are no adapters, ``form`` is ``"merged"`` and the base is 4-bit, or ``to`` is not empty.
    """
    run, to = Path(run), Path(to)
    check_target(run, to, overwrite)
    model, errors = load_merged(run, form, load)
    with replace_files(to) as beside:
        copy_settings(run, beside)
        for name in ("adapter_config.json", "config.json"):
            (beside / name).unlink(missing_ok=True)
        tokenizer = find_tokenizer(run)
        if tokenizer != str(run):
            _save_tokenizer(tokenizer, beside)
        with hide_progress_bars():
            write_weights(model, beside, max_shard_size or MAX_SHARD_SIZE)
        for file in sorted(beside.glob("*.safetensors")):
            add_metadata(file, {"zowrap": __version__, **_read_facts(run), **(metadata or {})})
    return [p for p in list_entries(to) if p.is_file()], errors


def _save_tokenizer(place: str, to: Path) -> None:
    """Write the tokenizer of a base beside the merged model; a base may have none."""
    with suppress(OSError, ValueError, ZOError):
        load_tokenizer(place).save_pretrained(to)


def _read_facts(run: Path) -> dict[str, str]:
    """Read from the header of a folder's weights how they were trained, without the entries about their format."""
    facts = read_metadata(weight_files(run)[0])
    return {name: value for name, value in facts.items() if name not in ("format", "base_options")}


def load_merged(folder: StrPath, form: str, load: Load | None) -> tuple[Any, dict[str, float]]:
    """Load the base of a folder of adapters and merge the adapters into it.

    Args:
        form: ``"merged"`` keeps the base's own precision; one of :data:`DTYPES` makes the whole model plain.

    Returns:
        The model, and for each layer the relative error that rounding makes in its change.

    Raises:
        ZOError: there are no adapters, or the base's precision cannot hold the merged weights.
    """
    from zowrap.quant import merge

    if load is None:
        raise TypeError("merging adapters needs load=zowrap.tasks.adapted.load_adapted")
    model, dtype = load(folder), DTYPES.get(form)
    lowering.lower(model)
    errors = merge.merge(model, dtype)
    if hasattr(model, "get_base_model"):  # peft's wrapper, which has nothing left to wrap
        model = model.get_base_model()
    if dtype is None:
        lowering.raise_back(model)
    else:
        lowering.dequantize(model, dtype)
    return model, errors
