"""Run E6: all rules on real classification tasks with a pretrained sentence encoder and the same number of forwards.

For each task and rule: η by a grid on seed 0, chosen on dev rows, then the other seeds at that η; accuracy on test
rows that nothing was chosen on. Weights, batches and seeds are the same for every rule; see
:mod:`benchmarks.papers.finetune` for a run and :mod:`benchmarks.papers.grid` for the search.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.papers import docs, spread
from benchmarks.papers.finetune import DATASETS, VARIANTS, Cell, exists, forwards_per_step, variant
from benchmarks.papers.grid import CellFile, Line, Runner, Unfinished, best_of, search
from zowrap import rules
from zowrap.errors import ZOError, nearest

NAME = "E6"
TITLE = "Language models: every rule at the same forwards, η by a grid, three seeds"

RULES = ("zo_sgd", "zo_adam", "radazo", "meazo", "conmezo", "lozo", "sparse_mezo", "meazo_blocks")
TASKS = ("trec", "banking77")

# Where the search for η starts: three half decades. A rule that divides by the size of ĝ moves each weight by about η
# a step; the others by η·|g|, and |g| is about 20 at the checkpoint's weights, so their grid is lower by that factor.
SCALE_FREE = (3e-4, 1e-3, 3e-3)
PLAIN = (1e-5, 3e-5, 1e-4)
GRIDS = {
    # At a common η it steps √((1+β₁)/(1−β₁)) = 4.4 times longer than ZO-Adam: m is smaller than ĝ.
    "radazo": (1e-4, 3e-4, 1e-3),
    # A quarter of each matrix moves.
    "sparse_mezo": (3e-5, 1e-4, 3e-4),
    # One layer of six moves per step.
    "meazo_blocks": (1e-3, 3e-3, 1e-2),
    "zo_sgd_blocks": (3e-5, 1e-4, 3e-4),
}


def grid_of(name: str) -> tuple[float, ...]:
    """The grid of a variant; by default that of its kind of rule."""
    rule = variant(name).rule
    kind = SCALE_FREE if rules.REGISTRY[rules.ALIASES.get(rule, rule)].scale_free else PLAIN
    return GRIDS.get(name) or GRIDS.get(rule) or kind


# Chosen so that a run takes from one to two minutes of one core. BANKING77 embeds 77 label names in every forward.
STEPS = {"trec": 200, "sst2": 200, "rte": 100, "banking77": 100}
BATCH_SIZE = 16  # MeZO's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(DATASETS)}")
    parser.add_argument("--rules", nargs="+", default=list(RULES), help=f"rules, or {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--extensions", type=int, default=2, help="most half decades that a grid may grow by")
    parser.add_argument("--finished", action="store_true", help="run nothing: report what the file of runs holds")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all experiments with fine-tuning runs share."""
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"), help="folder with trec, banking77 …")
    parser.add_argument("--model", default="minilm", help="sentence encoder or other classifier: directory or hub name")
    parser.add_argument("--steps", type=int, help="of two forwards; default: by task")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--cells", type=Path, help="file of finished runs, to go on from; default: OUT/cells.jsonl")
    parser.add_argument("--engine", choices=("compiled", "eager"), help="default: compiled where possible")


def check_options(options: argparse.Namespace) -> None:
    """Raise :class:`ZOError` for a task, rule or number that makes no sense, before anything is loaded."""
    known = [*rules.REGISTRY, *VARIANTS, *RULES]
    for task in options.tasks:
        if task not in DATASETS:
            raise ZOError(f"unknown task {task!r}{nearest(task, DATASETS)}")
    for rule in options.rules:
        if rule not in VARIANTS and variant(rule).rule not in known:
            raise ZOError(f"unknown rule {rule!r}{nearest(rule, known)}")
    if options.seeds < 1:
        raise ZOError(f"--seeds must be at least 1, got {options.seeds}")


def runner_of(options: argparse.Namespace) -> Runner:
    """A runner on the options' file of cells; a quick run keeps its cells to itself."""
    path = None if options.quick else options.cells or options.out / "cells.jsonl"
    say = functools.partial(print, file=sys.stderr)
    return Runner(CellFile(path), options.data_dir, options.engine, say, finished_only=options.finished)


def cell_of(options: argparse.Namespace, task: str, rule: str) -> Cell:
    """The cell of seed 0, η still open. A rule with more forwards per step takes as many steps fewer."""
    size = {"dev_rows": 32, "test_rows": 32} if options.quick else {}
    forwards = 2 * (options.steps or (3 if options.quick else STEPS[task]))
    steps = max(1, round(forwards / forwards_per_step(rule)))
    return Cell(task, rule, 0.0, 0, steps, batch_size=options.batch_size, model=options.model, **size)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compute the missing cells, and return all of them in the result."""
    if options.quick:
        options.tasks, options.rules, options.seeds, options.extensions = ["trec"], ["zo_sgd", "meazo"], 1, 0
        options.engine = options.engine or "eager"  # three steps are not worth a compilation
    check_options(options)
    runner = runner_of(options)
    missing = [rule for rule in options.rules if not exists(rule)]
    for rule in missing:
        print(f"{rule} is left out: this version of zowrap does not have it", file=sys.stderr)
    tasks = {}
    for task in options.tasks:
        found, unfinished = {}, []
        for rule in options.rules:
            if rule in missing:
                continue
            try:
                grid, seeds = run_at_best_rate(runner, cell_of(options, task, rule), options.seeds, options.extensions)
                found[rule] = {"grid": grid, "seeds": seeds}
            except Unfinished:
                unfinished.append(rule)
        steps = cell_of(options, task, "zo_sgd").steps
        untuned = runner.line(replace(cell_of(options, task, "zo_sgd"), steps=0))
        tasks[task] = {"steps": steps, "untuned": untuned, "rules": found, "unfinished": unfinished}
    return {
        "settings": {
            "model": options.model,
            "batch_size": options.batch_size,
            "seeds": options.seeds,
            "max_length": Cell.max_length,
            "eps": Cell.eps,
            "quick": options.quick,
        },
        "missing": missing,
        "tasks": tasks,
        "comparison": {task: comparisons(facts) for task, facts in tasks.items()},
        "versions": docs.describe_versions(),
    }


def run_at_best_rate(
    runner: Runner, cell: Cell, seeds: int, extensions: int, grid: Sequence[float] | None = None
) -> tuple[list[Line], list[Line]]:
    """The grid on the cell's seed, and one line per seed at its best η."""
    lines = search(runner.line, cell, grid or grid_of(cell.rule), extensions)
    best = best_of(lines)
    others = [runner.line(replace(cell, lr=best["lr"], seed=seed)) for seed in range(1, seeds)]
    return lines, [best, *others]


def comparisons(facts: dict[str, Any]) -> dict[str, Any]:
    """Compare each rule with MeZO over the seeds, by measure, leaving out rules with a loss that is not finite."""
    untuned = facts["untuned"]
    resolution = spread.resolution_of_accuracy(untuned["test_accuracy"], untuned["test_rows"])
    found = {}
    for measure, least in (("test_accuracy", resolution), ("dev_loss", 0.0)):
        groups = {rule: [line[measure] for line in runs["seeds"]] for rule, runs in facts["rules"].items()}
        finite = {rule: values for rule, values in groups.items() if None not in values}
        found[measure] = spread.compare(finite, "zo_sgd", least)
    return found


def rules_of(facts: dict[str, Any]) -> Sequence[str]:
    """The rules of a task's results, in the order of :data:`RULES`."""
    return sorted(facts["rules"], key=lambda rule: RULES.index(rule) if rule in RULES else len(RULES))
