"""Intervals and the paired test against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zowrap.numerics.intervals import (
    LEVEL,
    Z,
    confidence_interval,
    is_beyond_chance,
    ratio_interval,
    sign_test,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("count", [1, 2, 7, 10, 100, 872, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.49, 0.5, 0.977, 1.0])
def test_wilsons_interval_is_scipys(count, share):
    right = round(share * count)
    wanted = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


@pytest.mark.parametrize(
    ("better", "worse"),
    [(0, 0), (1, 0), (0, 5), (6, 0), (5, 5), (9, 3), (3, 9), (14, 23), (100, 61), (1500, 1400), (60_000, 59_000)],
)
def test_the_sign_test_is_scipys_binomial_test(better, worse):
    wanted = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(wanted, rel=1e-7)


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        counts = draw.integers(1, 20, 200)
        sums = counts * draw.normal(2.0, 1.0, 200)  # one level per row: its tokens are not independent
        low, high = ratio_interval(sums.tolist(), counts.tolist())
        covered += low <= 2.0 <= high
    assert 0.92 < covered / 400 < 0.98
    values = draw.normal(size=50)
    half = Z * stats.sem(values)
    assert ratio_interval(values.tolist(), [1] * 50) == pytest.approx((values.mean() - half, values.mean() + half))


def test_which_interval_a_figure_gets():
    assert confidence_interval([1.0, 0.0, 1.0, 1.0], [1] * 4) == wilson_interval(3, 4)
    assert confidence_interval([1.0, 0.0, 3.0], [1, 2, 4]) == ratio_interval([1.0, 0.0, 3.0], [1, 2, 4])
    assert (
        confidence_interval([0.5], [1]) is None
        and confidence_interval([], []) is None
        and confidence_interval([math.nan, 1.0], [1, 1]) is None
    )


def test_the_best_of_many_must_be_better_by_more():
    assert sign_test(14, 4) < LEVEL and is_beyond_chance(14, 4)
    assert not is_beyond_chance(14, 4, best_of=10) and is_beyond_chance(24, 4, best_of=10)
    assert not is_beyond_chance(4, 24) and not is_beyond_chance(0, 0)


def test_of_runs_that_change_nothing_few_claim_a_gain():
    """The best of ten evaluations, each a fresh set of noisy answers of a model as good as the first."""
    draw = np.random.default_rng(1)
    claims = 0
    for _ in range(300):
        before = draw.random(100) < 0.45
        best = max((draw.random(100) < 0.45 for _ in range(10)), key=np.sum)
        claims += is_beyond_chance(int((best & ~before).sum()), int((before & ~best).sum()), best_of=10)
    assert claims / 300 < LEVEL
