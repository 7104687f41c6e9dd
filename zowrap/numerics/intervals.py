"""Compute confidence intervals, and test whether two measurements on the same rows differ by more than chance.

Plain Python, so that a report needs neither torch nor a statistics package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 97.5 % of a normal distribution lie below: two-sided 95 %
LEVEL = 0.05


def wilson_interval(right: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a proportion, observed as ``right`` out of ``count`` (Wilson's score interval)."""
    share, square = right / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio_interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of Σ sums / Σ counts over independent rows.

    Rows are independent, the tokens within one are not, so this uses the standard error of a ratio of sums.

    Returns:
        (low, high); None for fewer than two rows, or where a sum is not finite.
    """
    rows, total = len(sums), math.fsum(counts)
    if rows < 2 or not total or not all(map(math.isfinite, sums)):
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * rows / (rows - 1)) / total
    return mean - half, mean + half


def confidence_interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of Σ sums / Σ counts: :func:`wilson_interval` if every row is right or wrong (1 or 0, counted
    once), else :func:`ratio_interval`.
    """
    if sums and all(count == 1 for count in counts) and all(value in (0, 1) for value in sums):
        return wilson_interval(math.fsum(sums), len(sums))
    return ratio_interval(sums, counts)


def sign_test(better: int, worse: int) -> float:
    """The exact two-sided p-value of a sign test: how often chance gives counts at least this far from half and half.

    Applied to the rows that were right before or after but not both, this is McNemar's test.
    """
    trials, few = better + worse, min(better, worse)
    if 2 * few >= trials:
        return 1.0
    whole = math.lgamma(trials + 1) - trials * math.log(2)
    terms = (math.exp(whole - math.lgamma(i + 1) - math.lgamma(trials - i + 1)) for i in range(few + 1))
    return min(1.0, 2 * math.fsum(terms))


def is_beyond_chance(better: int, worse: int, best_of: int = 1) -> bool:
    """Whether more rows got better than worse, significantly at the 5 % level.

    Args:
        best_of: how many evaluations this one was picked from as the best. The level is divided by it (Bonferroni),
            since the best of many looks like a gain more easily.
    """
    return better > worse and sign_test(better, worse) * max(1, best_of) < LEVEL
