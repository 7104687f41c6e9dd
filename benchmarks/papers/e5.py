"""E5: a black-box attack, every rule by the iterations it needs (the experiment of 2502.01014, on small images)."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.papers import digits
from benchmarks.papers.cells import Cells
from benchmarks.papers.common import Claim, chosen_seeds, chosen_steps, figure, section, spread, table
from benchmarks.papers.docs import describe_versions
from zowrap import rules
from zowrap.errors import ZOError

NAME = "E5"
TITLE = "Black-box attack on a digits classifier"
EPS, COMMON_LR = 1e-2, 1e-2
LRS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RULES: dict[str, dict[str, Any]] = {
    "zo_sgd": {},
    "zo_adamm": {"amsgrad": False},
    "radazo": {},
    "meazo": {},
    "conmezo": {},
}
EXPECTED = {"successes": 18, "of": 20}

Iterations = list[int | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="most iterations per image; 300 by default, 30 with --quick")
    parser.add_argument("--queries", type=int, nargs="+", metavar="K", help="directions per step; 2 10 by default")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of the runs; by default 0 1 2")


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    seeds, steps = chosen_seeds(options), chosen_steps(options.steps, 30 if options.quick else 300)
    queries = options.queries or ([2] if options.quick else [2, 10])
    if min(queries) < 1:
        raise ZOError(f"--queries must be whole numbers from 1, got {' '.join(map(str, queries))}")
    lrs, count = (LRS[1:3], 4) if options.quick else (LRS, EXPECTED["of"])
    images, labels, test_images, test_labels = digits.load()
    victim = digits.train(images, labels, epochs=5 if options.quick else 30)
    accuracy = (victim(test_images).argmax(-1) == test_labels).float().mean().item()
    chosen, targets = digits.targets(victim, test_images, test_labels, count)
    built = {name: rules.get(name, **hyper) for name, hyper in RULES.items()}
    results: dict[str, dict[str, Any]] = {}
    distortions: dict[str, dict[str, Any]] = {}
    for k in queries:
        results[str(k)], distortions[str(k)] = {}, {}
        for name, rule in built.items():
            runs = [(lr, seed, i) for lr in lrs for seed in seeds for i in range(count)]
            rows = torch.tensor([i for _, _, i in runs])
            cells = Cells(
                functools.partial(digits.attack, victim),
                rule,
                start=torch.zeros(len(runs), digits.PIXELS),
                lr=[lr for lr, _, _ in runs],
                seeds=[seed * count + i for _, seed, i in runs],
                eps=EPS,
                estimator="forward",
                queries=k,
                data={"image": chosen[rows], "target": targets[rows]},
            )
            iterations, distances = attack_until_success(victim, cells, steps)
            results[str(k)][name] = _by_lr_and_seed(iterations, len(seeds), count)
            distortions[str(k)][name] = _by_lr_and_seed(distances, len(seeds), count)
    return {
        "name": NAME,
        "quick": options.quick,
        "settings": {
            "victim": f"two convolutions and a linear layer, scikit-learn's 8×8 digits, test accuracy {accuracy:.3f}, "
            "trained by backpropagation",
            "attack": f"targeted, x ∈ R^64, loss = highest other logit − target's logit + {digits.DISTORTION:g}‖δ‖², "
            f"pixels clamped to [0, 1], δ_0 = 0; {count} test images, success when the target is the highest logit",
            "rules": "; ".join(rule.describe() for rule in built.values()),
            "probe": f"K gaussian directions, one-sided (K + 1 forwards), ε {EPS}, K = {', '.join(map(str, queries))}",
            "η": f"common {COMMON_LR:g}; tuned: of {', '.join(f'{lr:g}' for lr in lrs)} the one with most successes, "
            "then the smallest median (chosen on the same images)",
            "most iterations": steps,
            "seeds": ", ".join(map(str, seeds)),
        },
        "expected": EXPECTED,
        "lr": list(lrs),
        "images": count,
        "steps": steps,
        "iterations": results,
        "distortion": distortions,
        "versions": describe_versions(),
        "seconds": time.perf_counter() - began,
    }


@torch.no_grad()
def attack_until_success(victim: digits.Victim, cells: Cells, steps: int) -> tuple[Iterations, list[float | None]]:
    """Per cell the first step after which the target is the victim's answer, and ‖x − image‖ then.

    None where that never is.
    """
    first = torch.zeros(len(cells.seeds), dtype=torch.int64)
    distance = torch.zeros(len(cells.seeds))
    image, target = cells.data["image"], cells.data["target"]
    for step in range(1, steps + 1):
        cells.advance(1)
        x = digits.attacked(cells.theta, image)
        new = (first == 0) & (victim(x).argmax(-1) == target)
        first, distance = torch.where(new, step, first), torch.where(new, (x - image).norm(dim=-1), distance)
        if bool((first > 0).all()):
            break
    reached = first.tolist()
    return (
        [value or None for value in reached],
        [float(f"{d:.3g}") if at else None for at, d in zip(reached, distance.tolist(), strict=True)],
    )


def _by_lr_and_seed(values: list[Any], seeds: int, count: int) -> list[list[list[Any]]]:
    """``[η][seed][image]`` from the order of the cells."""
    rows = [values[i : i + count] for i in range(0, len(values), count)]
    return [rows[i : i + seeds] for i in range(0, len(rows), seeds)]


def flat(result: dict[str, Any], k: str, rule: str, at: int) -> Iterations:
    """Iterations over all seeds and images at the η of index ``at``."""
    return [value for row in result["iterations"][k][rule][at] for value in row]


def median(values: Iterations, failed: float) -> float:
    """Failures count as ``failed`` iterations."""
    return statistics.median(failed if value is None else value for value in values)


def tuned(result: dict[str, Any], k: str, rule: str) -> int:
    """Index of the best η: most successes, then the smallest median."""

    def key(at: int) -> tuple[int, float]:
        values = flat(result, k, rule, at)
        return values.count(None), median(values, result["steps"])

    return min(range(len(result["lr"])), key=key)


def successes(result: dict[str, Any], k: str, rule: str, at: int) -> list[int]:
    """Per seed, on how many images."""
    return [sum(value is not None for value in row) for row in result["iterations"][k][rule][at]]


def claims(result: dict[str, Any]) -> list[Claim]:
    least = result["expected"]["successes"] / result["expected"]["of"] * result["images"]
    common = result["lr"].index(COMMON_LR)
    made = []
    for k, found in result["iterations"].items():
        fewest = {rule: min(successes(result, k, rule, tuned(result, k, rule))) for rule in found}
        made.append(
            Claim(
                f"K {k}: successes of {result['images']} at tuned η, the worst seed of the worst rule",
                f"at least {least:g}",
                ", ".join(f"{rule} {value}" for rule, value in fewest.items()),
                min(fewest.values()) >= least,
            )
        )
        ours, theirs = (median(flat(result, k, rule, common), result["steps"]) for rule in ("radazo", "zo_adamm"))
        made.append(
            Claim(
                f"K {k}: median iterations at the common η, R-AdaZO against ZO-AdaMM",
                "no more",
                f"{ours:g} against {theirs:g}",
                ours <= theirs,
            )
        )
    return made


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, columns=len(result["iterations"]), width=6) as axes:
        panels = axes if len(result["iterations"]) > 1 else [axes]
        for panel, (k, found) in zip(panels, result["iterations"].items(), strict=True):
            for rule in found:
                medians = [median(flat(result, k, rule, at), result["steps"]) for at in range(len(result["lr"]))]
                panel.loglog(result["lr"], medians, marker=".", label=rule)
            panel.set_title(f"K = {k}")
            panel.set_xlabel("η")
        panels[0].set_ylabel("median iterations to success")
        panels[0].legend()


def report(result: dict[str, Any]) -> str:
    common = result["lr"].index(COMMON_LR)
    parts = []
    for k, found in result["iterations"].items():
        rows = []
        for rule in found:
            at = tuned(result, k, rule)
            rows.append(
                [rule, _summary(result, k, rule, common), f"{_summary(result, k, rule, at)} (η {result['lr'][at]:g})"]
            )
        parts.append(f"K = {k}:\n\n{table(['rule', f'common η {COMMON_LR:g}', 'tuned η'], rows)}")
    body = (
        "Iterations to success: median [quartiles] over images and seeds, a failure counted as "
        f"{result['steps']}; ± is of the seeds' medians; then the median ‖x − image‖ at success and successes per "
        "seed. Longer steps succeed earlier and farther away: nothing but the loss bounds the distance.\n\n"
        + "\n\n".join(parts)
    )
    return section(result, TITLE, claims(result), body)


def _summary(result: dict[str, Any], k: str, rule: str, at: int) -> str:
    values = [result["steps"] if value is None else value for value in flat(result, k, rule, at)]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    medians = [median(row, result["steps"]) for row in result["iterations"][k][rule][at]]
    per_seed = "/".join(map(str, successes(result, k, rule, at)))
    distances = [value for row in result["distortion"][k][rule][at] for value in row if value is not None]
    away = f"{statistics.median(distances):.2g}" if distances else "none"
    return f"{middle:g} [{low:g}, {high:g}], {spread(medians)}; {away}; {per_seed}"
