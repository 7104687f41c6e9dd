"""Find the rules that differ from a baseline by more than the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds (n − 1); None for a single seed."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def compare(groups: Mapping[str, Sequence[float]], baseline: str, resolution: float = 0.0) -> dict[str, Any]:
    """Differences of each group's mean from the baseline's, over the same seeds.

    A seed fixes batches and noise for every group, so its own effect is taken out first: the spread is that of what is
    left after the groups' and the seeds' means (a two-way layout, (groups − 1)(seeds − 1) degrees of freedom). A
    difference counts where it exceeds ``threshold``: Student's t at 5 %, two-sided, divided among the comparisons
    (Bonferroni), times the standard error of a difference of two means.

    Args:
        groups: one value per seed, in the same order of the seeds.
        resolution: the smallest difference that the measure itself can show, whatever the spread over seeds.

    Returns:
        ``baseline``, ``spread`` (standard deviation of a run), ``threshold`` and ``differences`` by group; spread and
        threshold are None with fewer than two groups or seeds.
    """
    from scipy.stats import t

    others = [name for name in groups if name != baseline]
    found: dict[str, Any] = {"baseline": baseline, "spread": None, "threshold": None, "differences": {}}
    if baseline not in groups or not others:
        return found
    means = {name: fmean(values) for name, values in groups.items()}
    found["differences"] = {name: means[name] - means[baseline] for name in others}
    seeds = len(groups[baseline])
    if seeds < 2:
        return found
    by_seed = [fmean(values[i] for values in groups.values()) for i in range(seeds)]
    grand = fmean(by_seed)
    left = [values[i] - means[name] - by_seed[i] + grand for name, values in groups.items() for i in range(seeds)]
    freedom = (len(groups) - 1) * (seeds - 1)
    found["spread"] = math.sqrt(sum(x * x for x in left) / freedom)
    quantile = float(t.ppf(1 - 0.025 / len(others), freedom))
    found["threshold"] = max(quantile * found["spread"] * math.sqrt(2 / seeds), resolution)
    return found


def resolution_of_accuracy(accuracy: float, rows: int) -> float:
    """1.96 standard errors of a difference of two accuracies on ``rows`` rows, their errors taken as independent.

    All seeds and rules are measured on the same rows, so more seeds do not make this smaller; errors on the same rows
    are alike, so it is an upper bound.
    """
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / rows)
