"""E2: R-AdaZO on four synthetic functions (2502.01014), at a common step size and at each rule's best."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.papers import functions
from benchmarks.papers.common import (
    Claim,
    add_seeds,
    best,
    chosen_seeds,
    chosen_steps,
    figure,
    finite,
    grid,
    mean,
    section,
    spread,
    table,
)
from benchmarks.papers.docs import describe_versions
from zowrap import rules

NAME = "E2"
TITLE = "R-AdaZO on four functions"
QUERIES, EPS, COMMON_LR = 10, 1e-2, 1e-3
BETAS = {"beta1": 0.9, "beta2": 0.99}
RECORDS = 10  # values of f along a run, in addition to f_0
LONGER = 4.36  # √((1 + β1)/(1 − β1)): how much longer R-AdaZO's steps are at a common η
FUNCTIONS = {
    "quadratic": functions.sphere,
    "cubic": functions.cubic,
    "levy": functions.levy,
    "rosenbrock": functions.rosenbrock,
}
FACTORS = (1.0, 2.0, LONGER, 8.0, 16.0, 32.0)  # times the common η: the tuned table's grid
EXPECTED = {"least": 3.0, "independent": [3.2, 3.7]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="d; 10000 by default, 500 with --quick")
    parser.add_argument("--steps", type=int, help="600 by default, 60 with --quick")
    add_seeds(parser)


def build_rules() -> dict[str, rules.Rule]:
    return {
        "radazo": rules.get("radazo", **BETAS),
        "zo_adamm": rules.get("zo_adamm", **BETAS, amsgrad=False),
        "zo_rmsprop": rules.get("zo_rmsprop", beta2=BETAS["beta2"]),
        "meazo": rules.get("meazo"),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    seeds = chosen_seeds(options)
    size = options.size or (500 if options.quick else 10_000)
    steps = chosen_steps(options.steps, 60 if options.quick else 600, RECORDS)
    factors = (1.0, LONGER) if options.quick else FACTORS
    built = build_rules()
    starts = functions.normal_starts(seeds, size)
    results: dict[str, dict[str, Any]] = {}
    for function, objective in FUNCTIONS.items():
        results[function] = {}
        for name, rule in built.items():
            # A direction of length 1 has elements of about 1/√d: MEAZO's η is per direction, the others' per element.
            lrs = [COMMON_LR * factor * (size**0.5 if name == "meazo" else 1.0) for factor in factors]
            cells = grid(
                objective,
                rule,
                lrs=lrs,
                starts=starts,
                seeds=seeds,
                eps=EPS,
                direction="unit_sphere",
                estimator="forward",
                queries=QUERIES,
                compiled=not options.quick,
            )
            trace = cells.trace(steps, steps // RECORDS)
            fall = (trace / trace[0]).reshape(1 + RECORDS, len(lrs), -1)  # [times, η, seeds]
            results[function][name] = {
                "lr": [float(f"{lr:.4g}") for lr in lrs],
                "final": [[finite(value) for value in row] for row in fall[-1].tolist()],
                "curves": [[finite(value) for value in fall[:, i].mean(-1).tolist()] for i in range(len(lrs))],
            }
    return {
        "name": NAME,
        "quick": options.quick,
        "settings": {
            "functions": f"½Σx², Σ|x|³ + x²/2, Levy, Rosenbrock; d {size}, x_0 ~ N(0, I) per seed",
            "rules": "; ".join(rule.describe() for rule in built.values()),
            "probe": f"{QUERIES} directions on the unit sphere, one-sided ({QUERIES + 1} forwards), ε {EPS}",
            "common η": COMMON_LR,
            "grid of the tuned table": f"common η times {', '.join(f'{f:g}' for f in factors)}; meazo: √d times that",
            "steps": steps,
            "seeds": ", ".join(map(str, seeds)),
        },
        "expected": EXPECTED,
        "factors": list(factors),
        "results": results,
        "versions": describe_versions(),
        "seconds": time.perf_counter() - began,
    }


def advantage(result: dict[str, Any], function: str) -> list[float]:
    """R-AdaZO's decrease of f over ZO-AdaMM's at the common η, per seed."""
    at = result["factors"].index(1.0)
    ours, theirs = (result["results"][function][name]["final"][at] for name in ("radazo", "zo_adamm"))
    return [(1 - a) / (1 - b) for a, b in zip(ours, theirs, strict=True)]


def tuned(result: dict[str, Any], function: str, rule: str) -> tuple[float, list[float | None]]:
    """The η of the grid with the smallest mean f at the end, and f_T / f_0 there."""
    found = result["results"][function][rule]
    at = best(found["final"])
    return found["lr"][at], found["final"][at]


def claims(result: dict[str, Any]) -> list[Claim]:
    low, high = result["expected"]["independent"]
    least = result["expected"]["least"]
    made = []
    for function in result["results"]:
        ratios = advantage(result, function)
        wanted = f"at least {least:g} (independent {low} to {high})"
        made.append(Claim(f"{function}: R-AdaZO / ZO-AdaMM, common η", wanted, spread(ratios), mean(ratios) >= least))
    if LONGER in result["factors"]:
        common, longer = result["factors"].index(1.0), result["factors"].index(LONGER)
        for function, found in result["results"].items():
            ours = 1 - mean(found["radazo"]["final"][common])
            values = {name: (1 - mean(found[name]["final"][longer])) / ours for name in ("zo_adamm", "zo_rmsprop")}
            made.append(
                Claim(
                    f"{function}: ZO-AdaMM, ZO-RMSProp at {LONGER} η against R-AdaZO at η",
                    "match or beat it (at least 0.95)",
                    ", ".join(f"{value:.3g}" for value in values.values()),
                    min(values.values()) >= 0.95,
                )
            )
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, columns=len(result["results"]), width=7.5, height=2.6) as axes:
        at = result["factors"].index(1.0)
        for panel, (function, found) in zip(axes, result["results"].items(), strict=True):
            for name, values in found.items():
                if name != "meazo":
                    panel.plot([i / RECORDS for i in range(1 + RECORDS)], values["curves"][at], label=name)
            panel.set_title(f"{function}, common η")
            panel.set_xlabel("part of the run")
        axes[0].set_ylabel("f / f_0")
        axes[0].legend()


def report(result: dict[str, Any]) -> str:
    names = list(next(iter(result["results"].values())))
    at = result["factors"].index(1.0)
    per_element = [name for name in names if name != "meazo"]
    common = [
        [function, *(_percent(found[name]["final"][at]) for name in per_element)]
        for function, found in result["results"].items()
    ]
    chosen = {function: [tuned(result, function, name) for name in names] for function in result["results"]}
    tuned_rows = [
        [f, *(f"{_percent(values)} (η {lr:g}{_edge(result, f, lr)})" for lr, values in row)]
        for f, row in chosen.items()
    ]
    winners = "; ".join(f"{function}: {_winners(result, function)}" for function in result["results"])
    body = (
        "Decrease of f in per cent of f(x_0). At the common η = "
        f"{COMMON_LR:g}:\n\n{table(['function', *per_element], common)}\n\n"
        f"At each rule's best η of the grid:\n\n{table(['function', *names], tuned_rows)}\n\n"
        f"† the grid's largest η: a longer step might do better still. "
        f"Largest decrease when tuned, up to one spread: {winners}. "
        f"With fresh directions R-AdaZO's steps are {LONGER} times ZO-AdaMM's at a common η (see "
        f"`zowrap/rules/radazo.py`): the rows at {LONGER} η compare steps of equal length."
    )
    return section(result, TITLE, claims(result), body)


def _winners(result: dict[str, Any], function: str) -> str:
    """The rules whose tuned decrease is the largest, or less by no more than the spread over seeds."""
    found = {name: tuned(result, function, name)[1] for name in result["results"][function]}
    first = min(found.values(), key=mean)
    limit = mean(first) + (statistics.stdev(value for value in first if value is not None) if len(first) > 1 else 0.0)
    return " and ".join(name for name, values in found.items() if mean(values) <= limit)


def _edge(result: dict[str, Any], function: str, lr: float) -> str:
    """A mark where ``lr`` is the largest of a rule's grid."""
    return "†" if any(lr == found["lr"][-1] for found in result["results"][function].values()) else ""


def _percent(final: list[float | None]) -> str:
    """Decrease of f in per cent, from f_T / f_0 per seed."""
    return spread([None if value is None else 100 * (1 - value) for value in final])
