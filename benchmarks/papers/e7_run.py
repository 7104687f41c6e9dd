"""Run E7: measure on MiniLM and TREC the quantities that the papers argue with.

Four observations that the rules' papers rest on, and their explanation of subspaces:

- ZO-Adam's v is the same in all coordinates (MEAZO: one scalar is enough);
- the momentum is better aligned with the gradient than a single estimate (R-AdaZO, ConMeZO);
- rules that divide by the size of the estimate are robust in η (MEAZO);
- ConMeZO's angle and memory matter together (heat map over θ and β);
- full, sparse, low-rank and block directions, at equal forwards, with stable rank and effective overlap (MeZO-BCD).

Runs are cells, shared with E6, and are not computed again if E6 has computed them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from benchmarks.papers import alignment, docs
from benchmarks.papers.e6_run import add_run_arguments, cell_of, grid_of, run_at_best_rate, runner_of
from benchmarks.papers.finetune import Cell, exists, rule_of
from benchmarks.papers.grid import Line, Runner, best_of, search

NAME = "E7"
TITLE = "What the papers argue with: v, momentum, robustness in η, the cone, subspaces"

TASK = "trec"
ROBUST = ("zo_sgd", "zo_adam", "meazo")
# Direction → the rule that uses it and is otherwise MeZO.
DIRECTIONS = {"full": "zo_sgd", "sparse": "sparse_mezo", "lowrank": "lozo", "block": "zo_sgd_blocks"}
THETAS = (1.2, 1.35, 1.45)
BETAS = (0.9, 0.95, 0.99)
# Shorter than E6's runs: the grids of six rules, nine more for the map, and three seeds of four directions.
STEPS, BATCH_SIZE, HEAT_STEPS = 120, 8, 60
TRACE_STEPS, EVERY = 60, 6
REFERENCE_ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.set_defaults(batch_size=BATCH_SIZE)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds for the directions, from 0")
    parser.add_argument("--extensions", type=int, default=2, help="most half decades that a grid may grow by")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.quick:
        options.seeds, options.extensions, options.engine = 1, 0, options.engine or "eager"
    elif options.steps is None:
        options.steps = STEPS
    options.finished = False
    runner = runner_of(options)
    steps, every = (4, 2) if options.quick else (TRACE_STEPS, EVERY)
    return {
        "settings": {
            "task": TASK,
            "model": options.model,
            "batch_size": options.batch_size,
            "seeds": options.seeds,
            "steps": cell_of(options, TASK, "zo_sgd").steps,
            "trace_steps": steps,
            "every": every,
            "reference_rows": REFERENCE_ROWS,
            "heat_steps": _heat_steps(options),
            "quick": options.quick,
        },
        "robustness": robustness(runner, options),
        "second_moment": second_moment(runner, options, steps, every),
        "momentum": momentum(runner, options, steps, every),
        "heat": heat(runner, options),
        "directions": directions(runner, options),
        "versions": docs.describe_versions(),
    }


def _grid(options: argparse.Namespace, rule: str) -> tuple[float, ...]:
    return grid_of(rule)[1:2] if options.quick else grid_of(rule)


def _best(runner: Runner, options: argparse.Namespace, rule: str) -> tuple[Cell, list[Line]]:
    """The cell at the rule's best η, seed 0, and the lines of its grid."""
    cell = cell_of(options, TASK, rule)
    lines = search(runner.line, cell, _grid(options, rule), options.extensions)
    return replace(cell, lr=best_of(lines)["lr"]), lines


def robustness(runner: Runner, options: argparse.Namespace) -> dict[str, list[Line]]:
    """E6's grids of the three rules."""
    return {rule: _best(runner, options, rule)[1] for rule in ROBUST}


def second_moment(runner: Runner, options: argparse.Namespace, steps: int, every: int) -> list[dict[str, float]]:
    cell = replace(_best(runner, options, "zo_adam")[0], steps=steps)
    beta = rule_of("zo_adam", steps).hyper["beta2"]
    return alignment.measure_second_moment(runner.bench(cell), cell, beta, every, REFERENCE_ROWS)


def momentum(runner: Runner, options: argparse.Namespace, steps: int, every: int) -> dict[str, Any]:
    """By rule: β of its m, and the cosines. ConMeZO's β is constant here, so that g z can be recovered from m."""
    found = {}
    for rule, name, key in (("radazo", "radazo", "beta1"), ("conmezo", "conmezo(warmup=False)", "beta")):
        cell = replace(_best(runner, options, rule)[0], rule=name, steps=steps)
        beta = rule_of(name, steps).hyper[key]
        looks = alignment.measure_momentum(runner.bench(cell), cell, beta, every, REFERENCE_ROWS)
        found[rule] = {"beta": beta, "looks": looks}
    return found


def _heat_steps(options: argparse.Namespace) -> int:
    return 2 if options.quick else HEAT_STEPS


def heat(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """Dev loss and accuracy over θ and β at ConMeZO's best η; MeZO at the same η is θ = π/2, whatever β."""
    best = _best(runner, options, "conmezo")[0]
    thetas, betas = (THETAS[1:2], BETAS[-2:]) if options.quick else (THETAS, BETAS)
    cell = replace(best, steps=_heat_steps(options))
    rows = [[runner.line(replace(cell, rule=f"conmezo(beta={b}, theta={t})")) for t in thetas] for b in betas]
    return {
        "lr": best.lr,
        "thetas": thetas,
        "betas": betas,
        "lines": rows,
        "mezo": runner.line(replace(cell, rule="zo_sgd")),
    }


def directions(runner: Runner, options: argparse.Namespace) -> dict[str, Any]:
    """By direction: the runs of its rule, stable rank and overlap at the checkpoint's weights."""
    there = {name: rule for name, rule in DIRECTIONS.items() if exists(rule)}
    for name in DIRECTIONS.keys() - there.keys():
        print(f"{name} directions are left out: this version of zowrap has no {DIRECTIONS[name]}", file=sys.stderr)
    runs = {}
    for name, rule in there.items():
        cell = cell_of(options, TASK, rule)
        grid, seeds = run_at_best_rate(runner, cell, options.seeds, options.extensions, _grid(options, rule))
        runs[name] = {"rule": rule, "grid": grid, "seeds": seeds}
    cell = replace(cell_of(options, TASK, "zo_sgd"), lr=1e-3)
    bench = runner.bench(cell)
    kept = alignment.find_moved(bench, replace(cell, rule="sparse_mezo")) if "sparse" in there else None
    zm = bench.reset(cell)
    truth = alignment.compute_gradient(zm, alignment.reference_batch(bench, REFERENCE_ROWS))
    rank = rule_of("lozo", 1).hyper["rank"] if "lowrank" in there else 2
    measured = alignment.measure_subspaces(zm, truth, kept, rank)
    for name in runs:
        runs[name].update(measured[name])
    return {"rank": rank, "count": sum(t.numel() for t in truth), "runs": runs}
