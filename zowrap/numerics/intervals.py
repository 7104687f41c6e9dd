"""How sure a measured figure is: intervals, and whether two measurements on the same rows differ beyond chance.

Plain Python: what is reported needs neither torch nor a package of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 97.5 % of a normal distribution lie below: two-sided 95 %
LEVEL = 0.05


def wilson(right: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of which ``right`` of ``count`` rows were seen (Wilson's score interval)."""
    share, square = right / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of Σ sums / Σ counts over rows that were drawn independently; None for fewer than two rows.

    The rows are what is independent, not the tokens in them: the standard error is that of a ratio of sums.
    """
    rows, total = len(sums), math.fsum(counts)
    if rows < 2 or not total or not all(map(math.isfinite, sums)):
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * rows / (rows - 1)) / total
    return mean - half, mean + half


def interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float] | None:
    """Of rows that are right or wrong :func:`wilson`, of any other figure :func:`ratio`."""
    if sums and all(count == 1 for count in counts) and all(value in (0, 1) for value in sums):
        return wilson(math.fsum(sums), len(sums))
    return ratio(sums, counts)


def sign_test(better: int, worse: int) -> float:
    """How often chance alone gives counts at least this far from half and half: exact, two-sided.

    Of rows that were right before or after, and not both, this is McNemar's test.
    """
    trials, few = better + worse, min(better, worse)
    if 2 * few >= trials:
        return 1.0
    whole = math.lgamma(trials + 1) - trials * math.log(2)
    terms = (math.exp(whole - math.lgamma(i + 1) - math.lgamma(trials - i + 1)) for i in range(few + 1))
    return min(1.0, 2 * math.fsum(terms))


def beyond_chance(better: int, worse: int, best_of: int = 1) -> bool:
    """Whether more rows got better than worse, beyond chance at the 5 % level.

    ``best_of`` evaluations were made and the best one is asked about, which must not pay: the level is divided by their
    number (Bonferroni), which bounds the chance that any of so many would look like a gain where there is none.
    """
    return better > worse and sign_test(better, worse) * max(1, best_of) < LEVEL
