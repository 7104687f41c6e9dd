"""Which rules differ from a baseline by more than the spread over seeds explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev, variance
from typing import Any


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds (n − 1); None for a single seed."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def compare(groups: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Any]:
    """Differences of each group's mean from the baseline's.

    The spread of single runs is pooled over all groups (few seeds each, alike in kind). A difference counts where it
    exceeds ``threshold``: Student's t at 5 %, two-sided, divided among the comparisons (Bonferroni), times the
    standard error of a difference of two means.

    Returns:
        ``baseline``, ``spread`` (pooled standard deviation), ``threshold`` and ``differences`` by group; spread and
        threshold are None where there is nothing to pool.
    """
    from scipy.stats import t

    others = [name for name in groups if name != baseline]
    if baseline not in groups or not others:
        return {"baseline": baseline, "spread": None, "threshold": None, "differences": {}}
    differences = {name: fmean(groups[name]) - fmean(groups[baseline]) for name in others}
    freedom = sum(len(values) - 1 for values in groups.values())
    if min(map(len, groups.values())) < 2:
        return {"baseline": baseline, "spread": None, "threshold": None, "differences": differences}
    pooled = math.sqrt(sum(variance(v) * (len(v) - 1) for v in groups.values()) / freedom)
    seeds = min(map(len, groups.values()))
    threshold = float(t.ppf(1 - 0.025 / len(others), freedom)) * pooled * math.sqrt(2 / seeds)
    return {"baseline": baseline, "spread": pooled, "threshold": threshold, "differences": differences}
