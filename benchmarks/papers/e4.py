"""E4: block-coordinate MeZO makes the progress of MeZO per forward, at 1/N of the noise and the update (2501.19099)."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zowrap
from benchmarks.papers import functions
from benchmarks.papers.cells import Cells, parameter_names
from benchmarks.papers.common import (
    Claim,
    add_seeds,
    chosen_seeds,
    chosen_steps,
    figure,
    final_ratios,
    finite,
    grid,
    mean,
    section,
    spread,
    table,
)
from benchmarks.papers.docs import describe_versions
from zowrap import rules
from zowrap.names import BLOCK_ORDERS

NAME = "E4"
TITLE = "Block-coordinate descent"
SIZE, EPS, BLOCKS = 1000, 1e-3, 10
LRS = (1e-4, 3e-4, 1e-3)  # MeZO's; the blocks' own is N times that
TIMED_SIZE = 1_000_000
EXPECTED = {"low": 0.85, "high": 1.2, "cost": 1 / BLOCKS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="6000 by default, 200 with --quick")
    add_seeds(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    seeds, steps = chosen_seeds(options), chosen_steps(options.steps, 200 if options.quick else 6000)
    lrs = LRS[-1:] if options.quick else LRS
    rule = rules.get("zo_sgd")
    starts = functions.normal_starts(seeds, SIZE)
    objective = functions.quadratic(torch.logspace(-2, 0, SIZE, dtype=torch.float64))
    compiled = not options.quick
    whole = grid(objective, rule, lrs=lrs, starts=starts, seeds=seeds, eps=EPS, compiled=compiled)
    mezo = final_ratios(whole, lrs, steps)
    runs = [(order, lr, i) for order in BLOCK_ORDERS for lr in lrs for i in range(len(seeds))]
    cells = Cells(
        objective,
        rule,
        start=torch.stack([starts[i] for _, _, i in runs]),
        lr=[lr * BLOCKS for _, lr, _ in runs],
        seeds=[seeds[i] for _, _, i in runs],
        eps=EPS,
        blocks=BLOCKS,
        block_order=[order for order, _, _ in runs],
        compiled=compiled,
    )
    ratios = iter(final_ratios(cells, [0.0] * len(BLOCK_ORDERS) * len(lrs), steps))
    orders = {order: [next(ratios) for _ in lrs] for order in BLOCK_ORDERS}
    update = {str(blocks): update_seconds(blocks) for blocks in (1, BLOCKS)}
    return {
        "name": NAME,
        "quick": options.quick,
        "settings": {
            "function": f"E3a's: ½ Σ λ_i x_i², d {SIZE}, λ log-spaced from 1/100 to 1, x_0 ~ N(0, I) per seed",
            "blocks": f"{BLOCKS} of {SIZE // BLOCKS} neighbours each, curvature rising block by block; one per step",
            "rule": f"zo_sgd; η {', '.join(f'{lr:g}' for lr in lrs)} for MeZO, {BLOCKS} times that with blocks",
            "probe": f"central, one gaussian direction, ε {EPS}",
            "steps": f"{steps} (2 forwards each)",
            "progress": "log(f_0 / f_T), so that 1 is the same rate per forward",
            "cost": f"seconds of one update (its noise included), eager engine, {TIMED_SIZE:,} elements, median of 15",
            "seeds": ", ".join(map(str, seeds)),
        },
        "expected": EXPECTED,
        "lr": list(lrs),
        "mezo": mezo,
        "orders": orders,
        "update_seconds": {name: finite(value) for name, value in update.items()},
        "versions": describe_versions(),
        "seconds": time.perf_counter() - began,
    }


class _Blocks(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.zeros(TIMED_SIZE // blocks) for _ in range(blocks)])


def _first(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return next(model.parameters()).sum()  # a loss is asked for and never evaluated


def update_seconds(blocks: int) -> float:
    """Seconds of ``ZOModel.update`` with that many blocks: noise drawn, weights written, no forward."""
    names = parameter_names(blocks) if blocks > 1 else None
    zm = zowrap.zo_wrap(
        _Blocks(blocks), "zo_sgd", blocks=names, engine="eager", loss_fn=lambda m, b: next(m.parameters()).sum()
    )
    times = []
    for _ in range(20):
        start = time.perf_counter()
        zm.update(projected_grad=torch.ones(1))
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:])


def progress(result: dict[str, Any], order: str, at: int) -> list[float]:
    """log(f_0/f_T) of the order over MeZO's, per seed, at the η of index ``at``."""
    pairs = zip(result["orders"][order][at], result["mezo"][at], strict=True)
    return [math.log(ours) / math.log(whole) for ours, whole in pairs]


def claims(result: dict[str, Any]) -> list[Claim]:
    low, high = result["expected"]["low"], result["expected"]["high"]
    made = []
    for order in result["orders"]:
        means = [mean(progress(result, order, at)) for at in range(len(result["lr"]))]
        obtained = ", ".join(f"{value:.3f}" for value in means)
        made.append(
            Claim(
                f"{order}: progress / MeZO's, at each η",
                f"{low} to {high}",
                obtained,
                low <= min(means) <= max(means) <= high,
            )
        )
    share = result["update_seconds"][str(BLOCKS)] / result["update_seconds"]["1"]
    made.append(
        Claim("noise and update / MeZO's", f"about {result['expected']['cost']:g}", f"{share:.2f}", share < 0.2)
    )
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path) as axes:
        for i, order in enumerate(result["orders"]):
            values = [progress(result, order, at) for at in range(len(result["lr"]))]
            spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            places = [at + 0.08 * i for at in range(len(values))]
            axes.errorbar(places, [mean(v) for v in values], spreads, fmt="o", label=order)
        for bound in (result["expected"]["low"], result["expected"]["high"]):
            axes.axhline(bound, color="grey", linestyle=":")
        axes.set_xticks(range(len(result["lr"])), [f"{lr:g}" for lr in result["lr"]])
        axes.set_xlabel("MeZO's η")
        axes.set_ylabel("progress / MeZO's")
        axes.legend()


def report(result: dict[str, Any]) -> str:
    rows = [["MeZO: f_T / f_0", *(spread(row) for row in result["mezo"])]]
    for order in result["orders"]:
        rows.append([order, *(spread(progress(result, order, at)) for at in range(len(result["lr"])))])
    times = result["update_seconds"]
    body = (
        f"Progress over MeZO's at the same forwards, by MeZO's η:\n\n"
        f"{table(['', *(f'η {lr:g}' for lr in result['lr'])], rows)}\n\nOne update: {1e3 * times['1']:.1f} ms for all "
        f"elements, {1e3 * times[str(BLOCKS)]:.1f} ms for one block of {BLOCKS}."
    )
    return section(result, TITLE, claims(result), body)
