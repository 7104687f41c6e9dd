"""``zowrap replay``: the last weights of a run from its base model and journal, without a forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from zowrap.cli.checks import check_recorded_rule
from zowrap.cli.console import begin, quiet_libraries, result
from zowrap.cli.options import Json, Plugin, Trust, load_plugins, option, takes
from zowrap.cli.paths import PATH
from zowrap.cli.tasks import check_target, recorded_base
from zowrap.errors import ZOError
from zowrap.names import python_file
from zowrap.storage.folder import RunFolder
from zowrap.storage.lock import lock_folder
from zowrap.storage.safetensors import START_VECTORS, check_directory


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
    begin(options.model, options.run)
    quiet_libraries()
    load_plugins(options.plugin)
    check_recorded_rule(config, run.path, [])
    from zowrap.quant import modes
    from zowrap.quant.schemes import bitsandbytes_options
    from zowrap.tasks.loading import choose_dtype, open_source
    from zowrap.tasks.resolve import restore_task
    from zowrap.training.replay import replay_run

    task = restore_task(config["task"])
    source = open_source(options.model, options.trust_remote_code)
    dtype, _ = choose_dtype(config["options"].get("dtype"), source)
    source.quantization = bitsandbytes_options(config["options"])
    if (run.path / START_VECTORS).is_file():
        source.label_vectors = run.path / START_VECTORS
    seed = int(config["options"].get("seed") or 0)
    model = task.build(source, dtype, seed)
    modes.choose_from_options(model, config["options"], seed)
    with lock_folder(options.to):
        zm = replay_run(model, options.run, options.to, tokenizer=source.tokenizer)
    record = {"to": options.to, "steps": zm.step_count, "rule": zm.rule.name}
    result(record, options.json, [f"wrote {options.to}: {zm.step_count} steps of {zm.rule.name} replayed"])
