"""A run that is gone on with takes its own options, and names those that differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer

from zowrap.cli.checks import PATHS, check_recorded_rule
from zowrap.cli.console import say
from zowrap.cli.options import CHANGEABLE, PER_CALL, RIGHTS, TuneOptions, given
from zowrap.cli.step import learning_rate
from zowrap.errors import ZOError
from zowrap.storage.folder import RunFolder


def saved_options(options: TuneOptions) -> dict[str, Any]:
    """The options as ``zowrap.json`` keeps them: files by absolute path, so that a run goes on from anywhere."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in PER_CALL}
    values["lr"] = learning_rate(options)
    for name in PATHS:
        if values[name] is not None and Path(values[name]).exists():
            values[name] = str(Path(values[name]).absolute())
    if options.plugin:
        values["plugin"] = options.plugin  # told when it is missing, never imported from here
    return values


def _check_rights(options: TuneOptions, saved: dict[str, Any]) -> None:
    """Ask again for the rights that the run was given: its folder may be somebody else's work.

    Raises:
        ZOError: it was tuned with code that its model brings.
    """
    if saved.get("trust_remote_code") and not options.trust_remote_code:
        raise ZOError(
            f"{options.out} was tuned with --trust-remote-code, which its folder cannot ask for: if you trust the code "
            f"of {saved.get('model')!r}, give --trust-remote-code again"
        )
    if saved.get("report_to") and not options.report_to:
        say(f"{options.out} reported to {saved['report_to']}: give --report-to again to go on with that")


def restore_options(context: typer.Context, options: TuneOptions) -> tuple[TuneOptions, dict[str, Any] | None]:
    """The run's own options with ``--resume``, but for those that may be given anew; its result, where it is finished.

    Raises:
        ZOError: ``--out`` is not a run.
    """
    if not options.resume:
        return options, None
    if options.overwrite:
        raise ZOError("--resume goes on with what --overwrite would remove: give one of them")
    if options.out is None:
        raise ZOError("which run is to go on? give --out RUN")
    run = RunFolder(options.out)
    if not run.config_file.is_file() and run.has_content():
        raise ZOError(f"{options.out} is not a run: there is no {run.config_file.name} in it")
    config = run.config() if run.config_file.is_file() else {}
    if not config.get("task"):
        if options.model is None:
            raise ZOError(f"there is no run in {options.out} to go on with")
        say(f"{options.out} holds nothing to go on from: starting over")
        return dataclasses.replace(options, resume=run.config_file.is_file()), None
    saved = config["options"]
    _check_rights(options, saved)
    asked = saved_options(options)
    for name, value in asked.items():
        if name not in RIGHTS and name in saved and given(context, name) and value != saved[name]:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            used = "and is used in its place" if name in CHANGEABLE else "which is used: a run keeps its options"
            say(f"{option} {value} differs from the run's own {saved[name]}, {used}")
    fields = {field.name for field in dataclasses.fields(TuneOptions)} - {*PER_CALL, *RIGHTS}
    anew = {name for name in CHANGEABLE if given(context, name)}
    kept = {name: value for name, value in saved.items() if name in fields - anew}
    status = run.status()
    if status.get("state") == "failed":
        raise ZOError(f"the run in {options.out} failed, and would fail again: {run.failure()}; start one anew")
    finished = status.get("result") if status.get("state") == "finished" else None
    if finished is None:
        check_recorded_rule(config, run.path, options.plugin)
    else:
        finished = {**finished, "out": options.out, "resumed_from": finished["steps"], "steps_run": 0}
    return dataclasses.replace(options, **kept), finished
