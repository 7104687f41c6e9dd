"""``zowrap export``: the tuned model out of a run, or a pickled model turned into safetensors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from zowrap import names
from zowrap.cli.checks import one_of
from zowrap.cli.console import begin, quiet_libraries, result
from zowrap.cli.eval import say_failure
from zowrap.cli.options import Json, option, takes
from zowrap.cli.paths import PATH
from zowrap.cli.scope import check_scope, list_asked
from zowrap.cli.tasks import check_target, recorded_base, say_other_adapters
from zowrap.errors import ZOError
from zowrap.storage import safetensors
from zowrap.storage.encoder_files import pickled_modules
from zowrap.storage.lock import lock_folder
from zowrap.storage.safetensors import adapter_file, could_be_hub_name, pickled_weights, weight_files


@dataclasses.dataclass
class ExportOptions:
    source: Annotated[
        str, typer.Argument(help="A run of zowrap tune, a model directory, or a hub name.", show_default=False), PATH
    ]
    to: Annotated[str | None, option("--to", "Directory to write: new or empty."), PATH] = None
    dtype: Annotated[str | None, option("--dtype", "float32, bfloat16 or float16; by default as it is.")] = None
    format: Annotated[
        str, option("--format", "same, bf16 or fp32 (a plain model: dequantised, adapters merged), adapters, merged.")
    ] = "same"
    max_shard_size: Annotated[str | None, option("--max-shard-size", "Split above this size, e.g. 2GB.")] = None
    allow_pickle: Annotated[
        bool, option("--allow-pickle", "Convert pickled weights (tensors only; nothing in them is run).")
    ] = False
    overwrite: Annotated[bool, option("--overwrite", "Write into a directory that is not empty.")] = False
    json: Json = False


@takes(ExportOptions)
def export(context: typer.Context, options: ExportOptions) -> None:
    """Write the tuned model of a run as safetensors that load with from_pretrained."""
    _check(options, list_asked(context, options))
    assert options.to is not None
    begin(options.source)
    quiet_libraries()

    source = _directory(options)
    check_target(options.to, options.overwrite, "--to", str(source), recorded_base(source))  # of the hub, too
    with lock_folder(options.to):
        _write(options, source)


def _write(options: ExportOptions, source: Path) -> None:
    """Write the model, as the one process that writes into ``--to``, and say what came of it."""
    from zowrap.storage.compare import measure_output_error
    from zowrap.storage.dequantize import is_quantized_folder
    from zowrap.storage.export import export_run
    from zowrap.storage.formats import DTYPES
    from zowrap.storage.pickles import convert_pickle
    from zowrap.tasks.adapted import load_adapted

    assert options.to is not None
    say_failure(source)
    say_other_adapters(source)
    errors: dict[str, float] = {}
    adapters = adapter_file(source).is_file()
    if options.format == "merged" or (adapters and options.format in DTYPES):
        from zowrap.storage.merge import export_merged

        files, errors = export_merged(
            source, options.to, load_adapted, options.max_shard_size, options.overwrite, options.format
        )
    elif options.allow_pickle and _holds_pickles(source):
        _check_as_it_is(options)
        files = convert_pickle(source, options.to, overwrite=options.overwrite)
    else:
        files = export_run(
            source,
            options.to,
            options.dtype,
            options.max_shard_size,
            overwrite=options.overwrite,
            form=options.format,
            load=load_adapted,
        )
    size = sum(file.stat().st_size for file in files)
    record = {"to": options.to, "files": [file.name for file in files], "bytes": size}
    lines = [f"wrote {options.to}: {len(files)} files, {size / 2**20:.1f} MiB"]
    if options.format in DTYPES and (adapters or is_quantized_folder(source)):
        error, why_not = measure_output_error(source, options.to, options.format, load_adapted)
        record |= {"logit_error": error, "logit_error_why": why_not}
        if error is None:
            lines.append(f"its outputs were not compared with the tuned model's: {why_not}")
        else:
            lines.append(f"its outputs differ from the tuned model's by {error:.1%} of their spread")
    if errors:
        record["merge_error"] = max(errors.values())
        lines.append(f"of the adapters, rounding took at most {record['merge_error']:.1%} of a layer's change")
    result(record, options.json, lines)


def _check(options: ExportOptions, asked: frozenset[str]) -> None:
    """Raise :class:`ZOError` for what is seen to be wrong without torch, and before a download."""
    if options.to is None:
        raise ZOError("where to? give --to DIR")
    one_of("--format", options.format, names.FORMATS)
    one_of("--dtype", options.dtype, names.DTYPES)
    size = options.max_shard_size
    if size is not None and not re.fullmatch(r"(?=.*[1-9])(\d*\.)?\d+ ?[KMGT]B", size.upper()):
        raise ZOError(f"--max-shard-size is a number of KB, MB, GB or TB, such as 2GB, and not {size!r}")
    path = Path(options.source)
    check_scope("export", asked, format=options.format)
    if options.format == "same" and adapter_file(path).is_file():  # adapters stay adapters, in one file
        check_scope("export", asked & {"max_shard_size"}, format="adapters")
    if not path.is_dir():
        if path.exists() or not could_be_hub_name(options.source):
            raise ZOError(f"no such run or model directory: {options.source}")
        return check_target(options.to, options.overwrite, "--to")
    check_target(options.to, options.overwrite, "--to", options.source, recorded_base(path))
    if options.allow_pickle and _holds_pickles(path):
        return _check_as_it_is(options)
    safetensors.check_model(path, whole=False)


def _holds_pickles(folder: Path) -> bool:
    """Whether the weights of a model, or of one of a sentence encoder's modules, are pickled."""
    return bool(pickled_weights(folder) and not weight_files(folder)) or bool(pickled_modules(folder))


def _check_as_it_is(options: ExportOptions) -> None:
    if options.dtype or options.max_shard_size:
        raise ZOError("--allow-pickle converts as it is: give --dtype or --max-shard-size to a second export")


def _directory(options: ExportOptions) -> Path:
    """The folder with the model's files; a model of the hub is fetched."""
    from zowrap.tasks.loading import fetch

    path = Path(options.source)
    return path if path.is_dir() else fetch(options.source, options.allow_pickle)
