"""E3: MEAZO over step sizes (a) and over blocks of different curvature (b) (2605.03869)."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers import functions
from benchmarks.papers.common import (
    Claim,
    add_seeds,
    best,
    chosen_seeds,
    chosen_steps,
    figure,
    final_ratios,
    grid,
    half_decades,
    mean,
    section,
    spread,
    table,
)
from benchmarks.papers.docs import describe_versions
from zowrap import rules

NAME = "E3"
TITLE = "MEAZO: step sizes (a) and blocks (b)"
SIZE, EPS = 1000, 1e-3
BETA, BETA_BLOCKS = 0.999, 0.9  # (a): the memory of v, the same in MEAZO and in ZO-Adam, whose own default it is
CURVATURES = (1.0, 10.0, 100.0, 1000.0)
EXPECTED = {"meazo_over_adam": 0.1, "blocks": 0.35, "tuned": [0.0349, 0.0374], "final": [0.039, 0.040, 0.0084]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, nargs=2, metavar=("A", "B"), help="6000 8000 by default")
    add_seeds(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    seeds = chosen_seeds(options)
    defaults = (200, 240) if options.quick else (6000, 8000)
    steps_a, steps_b = (chosen_steps(s, d) for s, d in zip(options.steps or (None, None), defaults, strict=True))
    starts = functions.normal_starts(seeds, SIZE)
    common: dict[str, Any] = {"starts": starts, "seeds": seeds, "eps": EPS, "compiled": not options.quick}

    objective = functions.quadratic(torch.logspace(-2, 0, SIZE, dtype=torch.float64))
    scale_free = half_decades(1e-4, 1.0)
    runs_a = {
        "zo_adam": (rules.get("zo_adam", beta2=BETA), scale_free),
        "meazo": (rules.get("meazo", beta=BETA), scale_free),
        "meazo, β 0.99": (rules.get("meazo"), scale_free),
        "zo_sgd": (rules.get("zo_sgd"), half_decades(1e-5, 1e-1)),
    }
    part_a = {}
    for name, (rule, lrs) in runs_a.items():
        part_a[name] = {"lr": lrs, "final": final_ratios(grid(objective, rule, lrs=lrs, **common), lrs, steps_a)}

    layered = functions.quadratic(torch.tensor(CURVATURES, dtype=torch.float64).repeat_interleave(SIZE // 4))
    meazo = rules.get("meazo", beta=BETA_BLOCKS)
    runs_b = {
        "zo_sgd": (rules.get("zo_sgd"), half_decades(1e-7, 1e-4, 4), False),
        "one scalar for all blocks": (meazo, half_decades(1e-4, 1e-1, 4), True),
        "one scalar per block": (meazo, half_decades(1e-4, 1e-1, 4), False),
    }
    part_b = {}
    for name, (rule, lrs, shared) in runs_b.items():
        cells = grid(layered, rule, lrs=lrs, blocks=4, shared_state=shared, **common)
        part_b[name] = {"lr": lrs, "final": final_ratios(cells, lrs, steps_b)}
    return {
        "name": NAME,
        "quick": options.quick,
        "settings": {
            "a": f"½ Σ λ_i x_i², d {SIZE}, λ log-spaced from 1/100 to 1, {steps_a} steps, η by half-decades, "
            f"β {BETA} in MEAZO and β2 {BETA} in ZO-Adam (β1 0.9)",
            "b": f"4 blocks of {SIZE // 4}, curvature {', '.join(f'{c:g}' for c in CURVATURES)}, one block per step in "
            f"ascending order, {steps_b} steps, β {BETA_BLOCKS}, η by half-decades and by quarter-decades",
            "x_0": "N(0, I) per seed, in (a) and (b)",
            "probe": f"central, one gaussian direction, ε {EPS}",
            "seeds": ", ".join(map(str, seeds)),
        },
        "expected": EXPECTED,
        "a": part_a,
        "b": part_b,
        "versions": describe_versions(),
        "seconds": time.perf_counter() - began,
    }


def quotients(result: dict[str, Any], name: str = "meazo") -> list[float]:
    """(a): MEAZO's mean f_T over ZO-Adam's at each η of their common grid."""
    rows = zip(result["a"][name]["final"], result["a"]["zo_adam"]["final"], strict=True)
    return [mean(meazo) / mean(adam) for meazo, adam in rows]


def best_of(result: dict[str, Any], name: str, every: int) -> tuple[float, list[float | None]]:
    """(b): best η and f_T / f_0 there, on the grid of half-decades (``every`` 2) or quarter-decades (1)."""
    found = result["b"][name]
    lrs, final = found["lr"][::every], found["final"][::every]
    return lrs[best(final)], final[best(final)]


def per_block_over_sgd(result: dict[str, Any], every: int) -> list[float]:
    """(b): per-block MEAZO over the best ZO-SGD, per seed."""
    ours, theirs = best_of(result, "one scalar per block", every)[1], best_of(result, "zo_sgd", every)[1]
    return [a / b if a is not None and b is not None else math.inf for a, b in zip(ours, theirs, strict=True)]


def claims(result: dict[str, Any]) -> list[Claim]:
    expected = result["expected"]
    off = max(abs(value - 1) for value in quotients(result))
    within = expected["meazo_over_adam"]
    finite = all(value is not None for row in result["a"]["meazo"]["final"] for value in row)
    sgd, meazo = result["a"]["zo_sgd"], result["a"]["meazo"]
    tuned = best(sgd["final"])
    after = mean(sgd["final"][tuned + 1]) if tuned + 1 < len(sgd["final"]) else 0.0
    ratio = per_block_over_sgd(result, 2)
    return [
        Claim("a: MEAZO / ZO-Adam, furthest from 1 at any η", f"within {within:.0%}", f"{off:.1%}", off <= within),
        Claim("a: MEAZO finite", "at every η", "at every η" if finite else "not at every η", finite),
        Claim(
            "a: tuned ZO-SGD, tuned MEAZO, f_T / f_0",
            "as good (independent {}, {})".format(*expected["tuned"]),
            f"{spread(sgd['final'][tuned])}, {spread(meazo['final'][best(meazo['final'])])}",
            mean(sgd["final"][tuned]) <= 1.1 * mean(meazo["final"][best(meazo["final"])]),
        ),
        Claim(
            "a: ZO-SGD one grid point after its best",
            "diverges",
            f"f_T / f_0 = {after:.3g}",
            after > 1,
        ),
        Claim(
            "b: scalar per block / best ZO-SGD",
            f"≤ {expected['blocks']} (independent 0.21 to 0.32)",
            spread(ratio),
            mean(ratio) <= expected["blocks"],
        ),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, columns=2) as axes:
        for panel, part in zip(axes, ("a", "b"), strict=True):
            for name, found in result[part].items():
                points = [(lr, mean(row)) for lr, row in zip(found["lr"], found["final"], strict=True)]
                points = [(lr, value) for lr, value in points if value < 1000]
                panel.loglog(*zip(*points, strict=True), marker=".", label=name)
            panel.set_title(part)
            panel.set_xlabel("η")
            panel.legend()
        axes[0].set_ylabel("f_T / f_0, mean over seeds")


def report(result: dict[str, Any]) -> str:
    found = result["a"]
    pairs = [quotients(result), quotients(result, "meazo, β 0.99")]
    rows_a = [
        [f"{lr:g}", spread(adam), spread(meazo), f"{same:.3f}", f"{default:.3f}"]
        for lr, adam, meazo, same, default in zip(
            found["meazo"]["lr"], found["zo_adam"]["final"], found["meazo"]["final"], *pairs, strict=True
        )
    ]
    rows_sgd = [
        [f"{lr:g}", _short(row)] for lr, row in zip(found["zo_sgd"]["lr"], found["zo_sgd"]["final"], strict=True)
    ]
    rows_b = []
    for name, independent in zip(result["b"], result["expected"]["final"], strict=True):
        cells = [best_of(result, name, every) for every in (2, 1)]
        rows_b.append([name, f"{independent:g}", *(f"{spread(final)} (η {lr:g})" for lr, final in cells)])
    coarse, fine = per_block_over_sgd(result, 2), per_block_over_sgd(result, 1)
    body = (
        "f_T / f_0 throughout.\n\n(a), the two scale-free rules, and MEAZO over ZO-Adam (quotient of means): with the "
        f"same memory of the second moment, β = β2 = {BETA}, and with MEAZO's default β 0.99, a shorter memory than "
        f"ZO-Adam's default, where it is up to {max(abs(value - 1) for value in pairs[1]):.0%} off:\n\n"
        f"{table(['η', 'zo_adam', 'meazo', 'quotient', 'quotient, β 0.99'], rows_a)}\n\n"
        f"{table(['η', 'zo_sgd'], rows_sgd)}\n\n"
        "(b), best over η; the scalar for all blocks exists only in this comparison (zowrap keeps one per block):\n\n"
        f"{table(['rule', 'independent', 'half-decades', 'quarter-decades'], rows_b)}\n\n"
        f"Per-block scalar over ZO-SGD: {spread(coarse)} on half-decades, {spread(fine)} on quarter-decades. "
        f"{_edge(result)}"
    )
    return section(result, TITLE, claims(result), body)


def _edge(result: dict[str, Any]) -> str:
    """Describe the position of ZO-SGD's best step size in the finer grid."""
    found = result["b"]["zo_sgd"]
    at = best(found["final"])
    after = found["final"][at + 1] if at + 1 < len(found["lr"]) else None
    if after is None or mean(after) < 1:
        return "ZO-SGD's best η of the finer grid is not its last stable one."
    return (
        f"The ratio depends on the grid: ZO-SGD's best η of the finer one, {found['lr'][at]:g}, is its last stable one "
        f"(f_T / f_0 = {mean(after):.2g} at {found['lr'][at + 1]:g})."
    )


def _short(row: list[float | None]) -> str:
    return spread(row) if mean(row) < 1 else "diverged"
