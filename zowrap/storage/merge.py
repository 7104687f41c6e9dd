"""Adapters merged into their base, and written as a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zowrap.quant import lowering
from zowrap.storage.formats import DTYPES
from zowrap.storage.lock import entries
from zowrap.storage.safetensors import Load, Path_, add_metadata, check_target, read_metadata, weight_files
from zowrap.storage.save import MAX_SHARD_SIZE, _copy_settings, _quiet, _write, fresh_files
from zowrap.version import __version__


def export_merged(
    run: Path_,
    to: Path_,
    load: Load | None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    form: str = "merged",
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[Path], dict[str, float]]:
    """Write the base of a RUN's adapters with them merged in, in the base's own precision, ``"bf16"`` or ``"fp32"``.

    Args:
        load: loads the model of a folder of adapters: :func:`zowrap.tasks.adapted.adapted`.

    Returns:
        The files written, and for each layer the part of its change that rounding took.

    Raises:
        ZOError: there are no adapters, ``form`` is ``"merged"`` and the base is 4-bit, or ``to`` is not empty.
    """
    run, to = Path(run), Path(to)
    check_target(run, to, overwrite)
    model, errors = merged(run, form, load)
    with fresh_files(to) as beside:
        _copy_settings(run, beside)
        for name in ("adapter_config.json", "config.json"):
            (beside / name).unlink(missing_ok=True)
        with _quiet():
            _write(model, beside, max_shard_size or MAX_SHARD_SIZE)
        for file in sorted(beside.glob("*.safetensors")):
            add_metadata(file, {"zowrap": __version__, **_facts_of(run), **(metadata or {})})
    return [p for p in entries(to) if p.is_file()], errors


def _facts_of(run: Path) -> dict[str, str]:
    """What the header of a folder's weights says of how they came about, less what is of their form."""
    facts = read_metadata(weight_files(run)[0])
    return {name: value for name, value in facts.items() if name not in ("format", "base_options")}


def merged(folder: Path_, form: str, load: Load | None) -> tuple[Any, dict[str, float]]:
    """The base of a folder of adapters with them merged in, and for each layer the part of its change that is lost.

    Args:
        form: ``"merged"`` into the base's own precision, or one of :data:`DTYPES`: the whole model then is a plain one.

    Raises:
        ZOError: there are no adapters, or the base's precision holds too little for them.
    """
    from zowrap.quant import merge

    if load is None:
        raise TypeError("adapters are merged by load=zowrap.tasks.adapted.adapted")
    model, dtype = load(folder), DTYPES.get(form)
    lowering.lower(model)
    errors = merge.merge(model, dtype)
    if dtype is None:
        lowering.raise_back(model)
    else:
        lowering.dequantize(model, dtype)
    return model, errors
