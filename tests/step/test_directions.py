"""Directions by name: their laws, what they compose with, and what is refused in a sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support.rule_cases import feed, flat, np_meazo, np_zo_adam
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.step import directions
from zowrap.testing import EPS, LR, draw_losses, wrap

SIZES = (15, 5, 10, 2)  # of the parameters that ``wrap`` tunes


def z_of(zm, query=None) -> np.ndarray:
    """The direction of the current step, all parameters in one vector."""
    query = zm.directions.queries[0] if query is None else query
    parts = [zm.engine.direction(query, i).double().numpy().ravel() for i in range(len(zm.parameters))]
    return np.concatenate(parts)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_directions_have_the_identity_for_covariance(rank) -> None:
    """For every rank: E[z zᵀ] = I and so ‖z‖² ≈ d. The sampling error of a diagonal entry is √(8/n) at rank 1."""
    zm = wrap("zo_sgd", direction=f"lowrank({rank})")
    count, parts = 20_000, []
    factors = zm.directions.lowrank(torch.arange(count), per_example=True).factors
    for place in (zm.job.layouts[0].places[i] for i in range(4)):
        left, right = place.left_of(factors), place.right_of(factors)
        parts.append(left.flatten(1) if right is None else torch.einsum("bir,bjr->bij", left, right).flatten(1))
    z = torch.cat(parts, dim=1).double()
    assert z.shape == (count, sum(SIZES)) and z.mean(0).abs().max() < 0.05
    assert (z.T @ z / count - torch.eye(sum(SIZES))).abs().max() < 0.15
    assert float(z.square().sum(1).mean()) == pytest.approx(sum(SIZES), rel=0.02)


def test_a_direction_of_rank_r_has_rank_r() -> None:
    zm = wrap("zo_sgd", direction="lowrank(2)")
    z = zm.engine.direction(zm.directions.queries[0], 0)
    assert z.shape == (5, 3) and torch.linalg.matrix_rank(z) == 2


def test_sparse_directions_leave_the_large_weights_out() -> None:
    zm = wrap("zo_sgd", direction="sparse(0.6)")
    z, w = z_of(zm), flat(zm)
    for part_z, part_w in zip(np.split(z, np.cumsum(SIZES)[:-1]), np.split(w, np.cumsum(SIZES)[:-1]), strict=True):
        kept = part_z != 0
        assert kept.sum() >= math.ceil(0.4 * len(part_w)) and kept.any()
        assert kept.all() or np.abs(part_w[kept]).max() < np.abs(part_w[~kept]).min()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lowrank", "lowrank(1)"),
        ("lowrank(3)", "lowrank(3)"),
        (" lowrank( rank = 3 , nu=7 ) ", "lowrank(3, nu=7)"),
        ("sparse", "sparse(0.75)"),
        ("sparse(0)", "sparse(0.0)"),
        ("sparse(sparsity=0.5, refresh=10)", "sparse(0.5, refresh=10)"),
        ("cone", "cone(theta=1.35, beta=0.99)"),
        ("cone(1, warmup=100)", "cone(theta=1.0, beta=0.99, warmup=100)"),
        ("unit_sphere", "unit_sphere"),
    ],
)
def test_a_name_says_all_there_is_to_a_direction(text, name) -> None:
    direction = directions.get(text)
    assert direction.name == name
    assert directions.get(name) is direction is directions.get(direction)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gausian", "did you mean 'gaussian'"),
        ("lowrnk(2)", "unknown direction 'lowrnk\\(2\\)'"),
        ("lowrank(2", "unknown direction"),
        ("lowrank(r)", "rank must be a whole number from 1, got 'r'"),
        ("lowrank(0)", "rank must be a whole number from 1, got 0"),
        ("lowrank(1.0)", "rank must be a whole number from 1, got 1.0"),
        ("lowrank(2, nu=0)", "nu must be a whole number from 1"),
        ("lowrank(2, 3, 4)", "has arguments that 'lowrank' does not take"),
        ("sparse(1.0)", r"sparsity must lie in \[0, 1\)"),
        ("sparse(0.5, refresh=-1)", "refresh must be a whole number of steps, 0 or more"),
        ("cone(2)", r"theta must lie in \(0, π/2\]"),
        ("cone(beta=1)", "beta must lie in"),
        ("cone(warmup=0.5)", "warmup must be False or a whole number"),
        ("cone(angle=1)", "has arguments that 'cone' does not take"),
        ("block", "chosen by blocks="),
        ("lozo", "lozo is a rule"),
        ("lozo(0, 5, paper)", "rank must be a whole number"),
        (["gaussian"], "unknown direction"),
        (3, "unknown direction 3"),
    ],
)
def test_what_is_no_direction_is_named(text, words) -> None:
    with pytest.raises(ZOError, match=words):
        directions.get(text)


def test_values_are_checked_whatever_was_asked_for_before() -> None:
    """1.0 and True equal 1 as keys of a cache; they are no ranks."""
    directions.lowrank(1)
    for rank in (1.0, True):
        with pytest.raises(ZOError, match="whole number"):
            directions.lowrank(rank)


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("conmezo", {"direction": "lowrank(1)"}, "conmezo works on each element of a direction"),
        ("hizoo", {"direction": "lowrank(1)"}, "hizoo works on each element"),
        ("sparse_mezo", {"direction": "lowrank(1)"}, "sparse_mezo works on each element"),
        ("zo_sgd", {"direction": "sparse", "estimator": "population"}, "which only low-rank ones can be"),
        ("conmezo", {"direction": "cone"}, "conmezo shapes its directions itself"),
        ("hizoo", {"direction": "sparse"}, "hizoo shapes its directions itself"),
        ("sparse_mezo", {"direction": "sphere"}, "use direction='gaussian'"),
        ("lozo", {"direction": "lowrank(2)"}, "lozo draws its own low-rank directions"),
        ("lozo_m", {"direction": "cone"}, "lozo_m draws its own low-rank directions"),
        ("lozo", {"estimator": "population"}, "cannot run a population"),
        ("lozo", {"estimator": "grzo"}, "cannot run a population"),
        ("zo_sgd", {"estimator": "population", "direction": "gaussian"}, "in place of 'gaussian'"),
        ("zo_sgd", {"estimator": "population", "queries": 2}, "queries must be 1, got 2"),
        ("fzoo", {"estimator": "population"}, "fzoo compares directions on the same examples"),
        ("hizoo", {"estimator": "population"}, "estimator must be 'central'"),
        (rules.zo_sgd(conservative=True), {"queries": 2}, "use queries=1"),
        (rules.zo_sgd(conservative=True), {"estimator": "population"}, "compares losses along one direction"),
        (rules.meazo(groups=True), {}, "groups=True needs blocks"),
    ],
)
def test_combinations_without_a_meaning_are_refused(rule, options, words) -> None:
    with pytest.raises(ZOError, match=words):
        wrap(rule, **options)


def test_groups_are_blocks() -> None:
    """With blocks each group has its own v: what ``groups=True`` insists on is what blocks do."""
    grouped, plain = (wrap(rules.meazo(groups=g), blocks="layer") for g in (True, False))
    for losses in draw_losses(grouped, 9):
        grouped.update(losses=losses)
        plain.update(losses=losses)
    assert np.array_equal(flat(grouped), flat(plain)) and np.array_equal(flat(grouped, 1), flat(plain, 1))
    assert grouped.job.states[0]["v"] != grouped.job.states[1]["v"]
    assert [float(s["n"]) for s in grouped.job.states] == [5, 4]


def check(zm, start: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(flat(zm) - expected) <= 1e-5 * np.linalg.norm(expected - start)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("rule", "reference"), [("meazo", np_meazo), ("zo_adam", np_zo_adam)])
def test_a_rule_along_a_cone_is_the_rule_with_the_cones_directions(rule, reference, queries) -> None:
    theta, beta = 1.1, 0.9
    zm = wrap(rule, direction=f"cone({theta}, {beta})", queries=queries)
    start = flat(zm)
    (history,) = feed(zm, draw_losses(zm, 20))
    m, shaped = np.zeros_like(start), []
    for seen in history:
        norm = np.linalg.norm(m)
        along = np.sqrt(len(m)) * math.cos(theta) * m / norm if norm >= 1e-8 else 0
        z = seen.u if norm < 1e-8 else along + math.sin(theta) * seen.u
        m = beta * m + (1 - beta) * seen.g @ z / len(seen.g)
        shaped.append(seen._replace(u=z))
    check(zm, start, reference(start, shaped))


def np_sparse(w: np.ndarray, history, sparsity: float, step) -> np.ndarray:
    """``step(g, z)`` is what a rule subtracts."""
    parts = np.split(np.abs(w), np.cumsum(SIZES)[:-1])
    limit = np.concatenate([np.full(len(p), np.sort(p)[math.ceil((1 - sparsity) * len(p)) - 1]) for p in parts])
    for seen in history:
        w = w - step(seen.g, seen.u * (np.abs(w) <= limit))
    return w


def meazo_step():
    v = n = 0

    def step(g, z):
        nonlocal v, n
        v, n = 0.99 * v + 0.01 * np.mean(g**2) / len(g), n + 1
        return LR * g @ z / len(g) / (np.sqrt(v / (1 - 0.99**n)) + 1e-8)

    return step


def adam_step():
    m, v, n = 0, 0, 0

    def step(g, z):
        nonlocal m, v, n
        ghat, n = g @ z / len(g), n + 1
        m, v = 0.9 * m + 0.1 * ghat, 0.999 * v + 0.001 * ghat**2
        return LR * m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)

    return step


@pytest.mark.parametrize(("rule", "step"), [("meazo", meazo_step), ("zo_adam", adam_step)])
def test_a_rule_along_sparse_directions_moves_the_small_weights_alone(rule, step) -> None:
    zm = wrap(rule, direction="sparse(0.5, refresh=0)", queries=2)
    start = flat(zm)
    (history,) = feed(zm, draw_losses(zm, 12))
    check(zm, start, np_sparse(start, history, 0.5, step()))
    assert (flat(zm) == start).sum() >= 10


def test_a_skipped_or_discarded_step_keeps_the_thresholds() -> None:
    zm = wrap(rules.sparse_mezo(refresh=2), lr=10.0)
    for losses in draw_losses(zm, 2):
        zm.update(losses=losses)
    before = [t.clone() for t in zm.job.slots["threshold"]]
    assert zm.directions.queries  # step 2 takes them anew
    assert any(not torch.equal(a, b) for a, b in zip(before, zm.job.slots["threshold"], strict=True))
    zm.discard()
    assert all(torch.equal(a, b) for a, b in zip(before, zm.job.slots["threshold"], strict=True))
    assert zm.update(losses=torch.full((2,), torch.nan)).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, zm.job.slots["threshold"], strict=True))


def test_a_foreign_rule_along_a_cone_keeps_its_own_kernels() -> None:
    """Two rules from elsewhere that describe themselves alike and differ inside."""
    import dataclasses

    ends = []
    for factor in (1.0, 2.0):

        def leaf(w, g, slots, c, hyper, factor=factor):
            return w - factor * hyper["lr"] * g, slots

        zm = wrap(dataclasses.replace(rules.zo_sgd(), leaf=leaf), direction="cone", engine="compiled")
        start = flat(zm)
        zm.update(projected_grad=torch.tensor(1.0))
        assert zm.inspect().engine == "compiled"
        ends.append(flat(zm) - start)
    assert np.allclose(ends[1], 2 * ends[0], rtol=1e-4, atol=1e-6) and zm.eps == EPS
