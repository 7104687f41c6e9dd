"""``zowrap replay``: the last weights of a run from its base model and journal, without a forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from zowrap.errors import ZOError
from zowrap.files import python_file, same_place
from zowrap.folder import RunFolder
from zowrap.lock import entries, locked
from zowrap.weights import adapters_base, check_directory

from .checks import check_recorded_rule
from .console import begin, quiet_libraries, result
from .options import PATH, Json, Plugin, Trust, load_plugins, option, takes


@dataclasses.dataclass
class ReplayOptions:
    model: Annotated[str, typer.Argument(help="The model the run started from.", show_default=False), PATH]
    run: Annotated[str, typer.Argument(help="The run, with its journal.", show_default=False), PATH]
    to: Annotated[str | None, option("--to", "Directory to write: new or empty."), PATH] = None
    overwrite: Annotated[bool, option("--overwrite", "Write into a directory that is not empty.")] = False
    plugin: Plugin = dataclasses.field(default_factory=list)
    trust_remote_code: Trust = False
    json: Json = False


@takes(ReplayOptions)
def replay(context: typer.Context, options: ReplayOptions) -> None:
    """Make the last weights of a run again, bitwise, from the base model and the journal."""
    if options.to is None:
        raise ZOError("where to? give --to DIR")
    check_target(options.to, options.overwrite, "--to", options.model, options.run)
    if not Path(options.run).is_dir():
        raise ZOError(f"no such run: {options.run}")
    run = RunFolder(options.run)
    config = run.config()
    check_target(options.to, options.overwrite, "--to", recorded_base(options.run))
    if not run.journal_file.is_file():
        raise ZOError(f"there is no journal at {run.journal_file}")
    for plugin in options.plugin:
        python_file(plugin)
    check_directory(options.model, whole=False)
    begin(f"{options.model} and {options.run}")
    quiet_libraries()
    load_plugins(options.plugin)
    check_recorded_rule(config, run.path, [])
    from zowrap.quant import quantization, ways
    from zowrap.run import replay_run
    from zowrap.tasks import choose_dtype, from_record, open_source

    task = from_record(config["task"])
    source = open_source(options.model, options.trust_remote_code)
    dtype, _ = choose_dtype(config["options"].get("dtype"), source)
    source.quantization = quantization(config["options"])
    seed = int(config["options"].get("seed") or 0)
    model = task.build(source, dtype, seed)
    ways.from_options(model, config["options"], seed)
    with locked(options.to):
        zm = replay_run(model, options.run, options.to, tokenizer=source.tokenizer)
    record = {"to": options.to, "steps": zm.step_count, "rule": zm.rule.name}
    result(record, options.json, [f"wrote {options.to}: {zm.step_count} steps of {zm.rule.name} replayed"])


def recorded_base(folder: str | Path) -> str | None:
    """The model that a run, or a folder of adapters, says it was made from."""
    run = RunFolder(folder)
    named = run.config().get("model") if run.config_file.is_file() else None
    return named or adapters_base(folder)


def check_target(to: str, overwrite: bool, option_name: str, *kept: Any) -> None:
    """Raise :class:`ZOError` unless ``to`` is a directory that may be written: new, empty, or to be replaced.

    Args:
        kept: folders that the command reads, or that what it reads was made from: they are never written over, by
            whatever name.
    """
    path = Path(to)
    if path.exists() and not path.is_dir():
        raise ZOError(f"{option_name} {to} is a file: give the name of a directory")
    for folder in kept:
        if isinstance(folder, str) and same_place(to, folder):
            raise ZOError(f"{option_name} {to} is {folder}, which would be written over: give another directory")
    if entries(path) and not overwrite:
        raise ZOError(f"{option_name} {to} is not empty: give a new directory, or --overwrite")
