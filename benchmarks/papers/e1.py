"""E1: ConMeZO against MeZO on an ill-conditioned quadratic (2511.02757, synthetic experiment)."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.papers import functions
from benchmarks.papers.cells import Cells
from benchmarks.papers.common import (
    Claim,
    add_seeds,
    chosen_seeds,
    chosen_steps,
    figure,
    finite,
    mean,
    section,
    spread,
    table,
)
from benchmarks.papers.docs import describe_versions
from zowrap import rules

NAME = "E1"
TITLE = "ConMeZO on a quadratic"
SIZE, EPS, LR, THETA, BETA = 1000, 1e-2, 1e-2, 1.30, 0.99
EXPECTED = {"paper": 2.45, "independent": 2.31, "low": 1.8, "high": 3.2, "at_1e4": 0.75}
EVERY = 100  # steps between two values of f: the ratio's resolution is 100 of about 40 000 steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="T; 100000 by default, 1000 with --quick")
    add_seeds(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    seeds, steps = chosen_seeds(options), chosen_steps(options.steps, 1000 if options.quick else 100_000, EVERY)
    objective = functions.quadratic(torch.logspace(-9, 0, SIZE, dtype=torch.float64))
    starts = functions.normal_starts(seeds, SIZE, norm=10.0)
    built = {"zo_sgd": rules.get("zo_sgd"), "conmezo": rules.get("conmezo", theta=THETA, beta=BETA)}
    traces: dict[str, Tensor] = {}
    for name, rule in built.items():
        cells = Cells(
            objective,
            rule,
            start=starts,
            lr=[LR] * len(seeds),
            seeds=seeds,
            eps=EPS,
            compiled=not options.quick,
        )
        traces[name] = cells.trace(steps, EVERY)
    means = {name: trace.mean(1) for name, trace in traces.items()}
    kept = _kept(len(means["zo_sgd"]))
    return {
        "name": NAME,
        "quick": options.quick,
        "settings": {
            "function": f"½ Σ λ_i x_i², d {SIZE}, λ geometric from 1e-9 to 1, ‖x_0‖ 10 in a random direction per seed",
            "rules": f"zo_sgd (MeZO) and {built['conmezo'].describe()}, both η {LR}",
            "probe": f"central, one gaussian direction, ε {EPS}",
            "steps T": steps,
            "seeds": ", ".join(map(str, seeds)),
        },
        "expected": EXPECTED,
        "steps": [i * EVERY for i in kept],
        "f": {name: [finite(value[i].item()) for i in kept] for name, value in means.items()},
        "ratio": finite(speedup(means["zo_sgd"], means["conmezo"])),
        "ratios": [finite(speedup(traces["zo_sgd"][:, i], traces["conmezo"][:, i])) for i in range(len(seeds))],
        "quotients": {
            str(at): [finite(v) for v in (traces["conmezo"][at // EVERY] / traces["zo_sgd"][at // EVERY]).tolist()]
            for at in (1000, 10_000, 100_000)
            if at <= steps
        },
        "versions": describe_versions(),
        "seconds": time.perf_counter() - began,
    }


def speedup(mezo: Tensor, conmezo: Tensor) -> float:
    """T over the first step at which ConMeZO is at or below MeZO's last value; 0 where it never is."""
    below = (conmezo <= mezo[-1]).nonzero()
    return (len(mezo) - 1) / int(below[0]) if len(below) else 0.0


def _kept(count: int) -> list[int]:
    """About 120 indices, evenly spaced on a logarithmic axis, the first and the last among them."""
    return sorted({0, *(round(v) for v in torch.logspace(0, torch.tensor(count - 1.0).log10(), 120).tolist())})


def claims(result: dict[str, Any]) -> list[Claim]:
    expected = result["expected"]
    ratio = result["ratio"]
    low, high = expected["low"], expected["high"]
    wanted = f"{low} to {high} (paper {expected['paper']}, independent {expected['independent']})"
    made = [Claim("ratio T / T_ConMeZO", wanted, f"{ratio:.2f}", low <= ratio <= high)]
    bands = {
        "1000": (1.0, math.inf, "above 1: slightly behind"),
        "10000": (0.0, expected["at_1e4"], f"below {expected['at_1e4']}"),
    }
    for at, (low, high, words) in bands.items():
        if at in result["quotients"]:
            values = result["quotients"][at]
            made.append(Claim(f"f_ConMeZO / f_MeZO at step {at}", words, spread(values), low <= mean(values) < high))
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path) as axes:
        for name, values in result["f"].items():
            axes.loglog(result["steps"][1:], values[1:], label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("f, mean over seeds")
        axes.legend()


def report(result: dict[str, Any]) -> str:
    rows = [[f"{int(at):,}", spread(values)] for at, values in result["quotients"].items()]
    body = (
        "The ratio is of the curves averaged over seeds; each seed's own: "
        f"{', '.join(f'{value:.2f}' for value in result['ratios'])}.\n\n"
        + table(["step", "f_ConMeZO / f_MeZO (± over seeds)"], rows)
    )
    return section(result, TITLE, claims(result), body)
