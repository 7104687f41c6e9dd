"""``zowrap bench step``: what one training step costs against two plain forwards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from zowrap.errors import ZOError

from .console import quiet_libraries, result, say
from .options import Json, option, takes


@dataclasses.dataclass
class BenchOptions:
    arch: Annotated[str, option("--arch", "Architecture by name, with random weights: opt-125m, llama-60m, …")] = (
        "opt-125m"
    )
    batch: Annotated[int, option("--batch", "Rows of the batch.")] = 8
    seq: Annotated[int, option("--seq", "Tokens of each row.")] = 64
    row: Annotated[list[str], option("--row", "Only this row, beside the plain forwards. Repeatable.")] = (
        dataclasses.field(default_factory=list)
    )
    # 7: quartiles mean something, and a run over all rows at OPT-125M stays near ten minutes on two cores.
    rounds: Annotated[int, option("--rounds", "How many times each row is timed.")] = 7
    dtype: Annotated[str, option("--dtype", "float32, bfloat16 or float16.")] = "float32"
    memory: Annotated[bool, option("--memory/--no-memory", "Measure peak memory, in a process for each row.")] = True
    peak_of: Annotated[str | None, option("--peak-of", "Print the peak memory of one row.", hidden=True)] = None
    json: Json = False


@takes(BenchOptions)
def step(context: typer.Context, options: BenchOptions) -> None:
    """Time a training step against two plain compiled forwards of the same model and batch, interleaved."""
    quiet_libraries()
    from zowrap.bench import contenders, measure

    _check(options)
    if options.peak_of is not None:
        result({"peak_bytes": measure.peak_bytes(_contender(options, options.peak_of))}, options.json)
        return
    names = [*contenders.PLAIN, *options.row] if options.row else list(contenders.NAMES)
    rows = []
    for name in names:
        say(f"preparing: {name}")
        rows.append(_contender(options, name))
    say(f"timing {len(rows)} rows, {options.rounds} rounds")
    times = measure.interleaved(rows, options.rounds)
    records = []
    for row in rows:
        record: dict[str, Any] = {"row": row.name, "seconds": measure.spread(times[row.name])}
        record["ratio"] = measure.spread(measure.ratios(times, row.name))
        record["first_call_seconds"] = row.compile_seconds
        if options.memory:
            say(f"memory: {row.name}")
            record["peak_bytes"] = _peak(options, row.name)
        records.append(record)
    facts = {"arch": options.arch, "batch": options.batch, "seq": options.seq, "dtype": options.dtype}
    result(
        {**facts, "rounds": options.rounds, "machine": measure.machine(), "rows": records}, options.json, lines(records)
    )


def lines(records: list[dict[str, Any]]) -> list[str]:
    """The table for people."""
    found = [f"{'':24} {'ms/step':>9} {'ratio':>7} {'quartiles':>15} {'first call':>11} {'peak':>9}"]
    for r in records:
        ratio, first, peak = r["ratio"], r["first_call_seconds"], r.get("peak_bytes")
        found.append(
            f"{r['row']:24} {r['seconds']['median'] * 1e3:9.1f} {ratio['median']:7.2f} "
            f"{ratio['low']:7.2f}–{ratio['high']:<7.2f} "
            f"{'' if first is None else f'{first:.1f} s':>11} {'' if peak is None else f'{peak / 2**20:.0f} MB':>9}"
        )
    return found


def _check(options: BenchOptions) -> None:
    for name in ("batch", "seq", "rounds"):
        if getattr(options, name) < 1:
            raise ZOError(f"--{name} must be from 1, got {getattr(options, name)}")
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise ZOError(f"--dtype is float32, bfloat16 or float16, not {options.dtype!r}")


def _contender(options: BenchOptions, name: str) -> Any:
    import torch

    from zowrap.bench import architectures, contenders

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = architectures.build(options.arch, getattr(torch, options.dtype), device)
    return contenders.make(name, model, architectures.batch_for(model, options.batch, options.seq))


def _peak(options: BenchOptions, name: str) -> int | None:
    """Peak memory of one row, in a process of its own."""
    command = [sys.executable, "-m", "zowrap.cli", "bench", "step", "--json", "--peak-of", name]
    for key in ("arch", "batch", "seq", "dtype"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"warning: the memory of {name!r} could not be measured: {done.stderr.strip()[-200:]}")
        return None
    return json.loads(done.stdout)["peak_bytes"]
