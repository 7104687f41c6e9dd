"""``zowrap bench step``: what one training step costs against two plain forwards."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated, Any

import typer

from zowrap import names
from zowrap.cli.checks import one_of
from zowrap.cli.console import quiet_libraries, result, say
from zowrap.cli.options import Json, option, takes
from zowrap.compiler import cache
from zowrap.errors import ZOError


@dataclasses.dataclass
class BenchOptions:
    arch: Annotated[str, option("--arch", "Architecture by name, with random weights: opt-125m, llama-60m, …")] = (
        "opt-125m"
    )
    batch: Annotated[int, option("--batch", "Rows of the batch.")] = 8
    seq: Annotated[int, option("--seq", "Tokens of each row.")] = 64
    row: Annotated[
        list[str],
        option(
            "--row",
            "Only this row, beside the plain forwards: one of the table's, or "
            "'RULE[, DIRECTION][, ESTIMATOR][, N queries][, one layer per step]'. Repeatable.",
        ),
    ] = dataclasses.field(default_factory=list)
    # 7: quartiles mean something, and a run over all rows at OPT-125M stays near ten minutes on two cores.
    rounds: Annotated[int, option("--rounds", "How many times each row is timed.")] = 7
    dtype: Annotated[str, option("--dtype", "float32, bfloat16 or float16.")] = "float32"
    alone: Annotated[
        bool,
        option("--alone/--together", "Also run each row in processes of its own: peak memory, first and second start."),
    ] = True
    only: Annotated[str | None, option("--only", "Print what one row takes in this process.", hidden=True)] = None
    json: Json = False


@takes(BenchOptions)
def step(context: typer.Context, options: BenchOptions) -> None:
    """Time a training step against two plain compiled forwards of the same model and batch, interleaved."""
    _check(options)
    quiet_libraries()
    from zowrap.bench import contenders, measure

    make = _maker(options)
    if options.only is not None:
        contender = make(options.only)
        facts = {
            "start_seconds": contender.start_seconds,
            "peak_bytes": measure.measure_peak_bytes(contender, _device()),
        }
        result(facts, options.json)
        return
    rows = []
    for name in contenders.list_names(options.row):
        say(f"preparing: {name}")
        rows.append(make(name))
    say(f"timing {len(rows)} rows, {options.rounds} rounds")
    times = measure.time_interleaved(rows, options.rounds)
    records = []
    for row in rows:
        seconds, ratios = zip(*times[row.name], strict=True)
        record: dict[str, Any] = {"row": row.name, "seconds": measure.summarise_spread(seconds)}
        record["ratio"] = measure.summarise_spread(ratios)
        if options.alone:
            say(f"alone: {row.name}")
            record.update(_alone(options, row.name))
        records.append(record)
    facts = {"arch": options.arch, "batch": options.batch, "seq": options.seq, "dtype": options.dtype}
    result(
        {**facts, "rounds": options.rounds, "machine": measure.describe_machine(), "rows": records},
        options.json,
        lines(records),
    )


def lines(records: list[dict[str, Any]]) -> list[str]:
    """The table for people."""
    found = [f"{'':24} {'ms/step':>9} {'ratio':>7} {'quartiles':>13} {'first start':>12} {'second':>8} {'peak':>9}"]
    for r in records:
        ratio, first, second, peak = r["ratio"], r.get("first_start"), r.get("second_start"), r.get("peak_bytes")
        found.append(
            f"{r['row']:24} {r['seconds']['median'] * 1e3:9.1f} {ratio['median']:7.2f} "
            f"{ratio['low']:6.2f}–{ratio['high']:<6.2f} "
            f"{'' if first is None else f'{first:.1f} s':>12} {'' if second is None else f'{second:.1f} s':>8} "
            f"{'' if peak is None else f'{peak / 2**20:.0f} MB':>9}"
        )
    return found


def _check(options: BenchOptions) -> None:
    for name in ("batch", "seq", "rounds"):
        if getattr(options, name) < 1:
            raise ZOError(f"--{name} must be from 1, got {getattr(options, name)}")
    one_of("--dtype", options.dtype, names.DTYPES)


def _device() -> Any:
    """The machine that all rows run on."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _maker(options: BenchOptions) -> Callable[[str], Any]:
    """Contenders by name; all that leave the model's modules as they are share one model."""
    import torch

    from zowrap.bench import architectures, contenders

    build = functools.partial(architectures.build_model, options.arch, getattr(torch, options.dtype), str(_device()))
    shared = functools.cache(build)

    def make(name: str) -> Any:
        model = build() if contenders.needs_own_model(name) else shared()
        return contenders.make_contender(name, model, architectures.make_batch(model, options.batch, options.seq))

    return make


def _alone(options: BenchOptions, name: str) -> dict[str, Any]:
    """Peak memory of one row, and the seconds until its first step is done, with no compiled code at hand and again.

    Two processes of their own, one after the other, with a cache folder of their own.
    """
    command = [sys.executable, "-m", "zowrap.cli", "bench", "step", "--json", "--only", name]
    for key in ("arch", "batch", "seq", "dtype"):
        command += [f"--{key}", str(getattr(options, key))]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            env = {**os.environ, cache.OURS: folder}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                say(f"warning: {name!r} could not be run alone: {done.stderr.strip()[-200:]}")
                return {}
            found.append(json.loads(done.stdout))
    first, second = found
    return {
        "first_start": first["start_seconds"],
        "second_start": second["start_seconds"],
        "peak_bytes": second["peak_bytes"],
    }
