"""Each rule equals its formula, written again in NumPy; the relations between rules; bad values are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import zowrap
from tests.support.rule_cases import CASES, KINDS, feed, flat, name_of, noise_of
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.step import arithmetic
from zowrap.step.arithmetic import sum_slots
from zowrap.testing import EPS, LR, draw_losses, wrap


def queries_of(name: str, queries: int) -> int:
    return max(queries, 2) if name == "fzoo" else queries


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_rule_equals_numpy(case, queries) -> None:
    name, hyper, reference = case
    queries = 1 if hyper.get("conservative") else queries_of(name, queries)
    zm = wrap(rules.get(name, **hyper), queries=queries)
    start = flat(zm)
    (history,) = feed(zm, draw_losses(zm, 30))
    expected = reference(start, history, **hyper)
    moved = np.linalg.norm(expected - start)
    assert moved > 0
    assert np.linalg.norm(flat(zm) - expected) <= 1e-5 * moved


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_each_block_is_a_run_of_its_own(case) -> None:
    """State, counters and norms belong to the block: each follows the formula over its own steps alone."""
    name, hyper, reference = case
    zm = wrap(rules.get(name, **hyper), blocks="layer", block_order="flip_flop")
    assert len(zm.job.blocks) == 2
    starts = [flat(zm, b) for b in range(2)]
    histories = feed(zm, draw_losses(zm, 13))
    assert [len(h) for h in histories] == [7, 6]
    for b, (start, history) in enumerate(zip(starts, histories, strict=True)):
        expected = reference(start, history, **hyper)
        assert np.linalg.norm(flat(zm, b) - expected) <= 1e-5 * np.linalg.norm(expected - start)
    assert all("n" not in s or s["n"] == n for s, n in zip(zm.job.states, (7, 6), strict=True))


def test_mezo_is_zo_sgd() -> None:
    assert rules.mezo is rules.zo_sgd
    assert rules.get("mezo").name == "zo_sgd"


def same(one, other, steps: int = 12, **options) -> float:
    """How far two rules fed the same losses end apart, relative to how far they went."""
    a, b = wrap(one, **options), wrap(other, **options)
    start, losses = flat(a), draw_losses(a, steps)
    feed(a, losses)
    feed(b, losses)
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(a) - start))


def test_a_cone_of_half_a_turn_is_mezo() -> None:
    assert same(rules.conmezo(theta=math.pi / 2), "zo_sgd") == 0.0


def test_zo_rmsprop_is_zo_adam_without_its_first_moment() -> None:
    assert same(rules.zo_rmsprop(beta2=0.9), rules.zo_adam(beta1=0, beta2=0.9)) <= 1e-6


def test_hizoo_that_never_measures_is_mezo() -> None:
    losses = draw_losses(wrap("zo_sgd"), 12)
    a, b = wrap(rules.hizoo(a=0)), wrap("zo_sgd")
    for pair in losses:
        a.update(losses=torch.cat((torch.zeros(1), pair)))
        b.update(losses=pair)
    assert np.array_equal(flat(a), flat(b))


def test_radazo_without_momentum_is_adamm_where_zeta_is_small() -> None:
    """ζ stands inside one root and outside the other: equal to 1e-3 where √v ≥ 1e-1."""
    one, other = wrap(rules.radazo(beta1=0)), wrap(rules.zo_adamm(beta1=0, amsgrad=False))
    for losses in draw_losses(one, 20):
        before = flat(one), flat(other)
        for zm in (one, other):
            zm.update(losses=losses)
        steps = flat(one) - before[0], flat(other) - before[1]
        v = np.concatenate([t.numpy().ravel() for t in other.job.slots["v"]])
        clear = np.sqrt(v) >= 1e-1
        assert np.allclose(steps[0][clear], steps[1][clear], rtol=1e-3, atol=1e-6)
    assert clear.any()


def test_meazo_first_step_is_the_signed_direction() -> None:
    for g in (1e-6, -3.0, 4e7):
        zm = wrap("meazo")
        before = flat(zm)
        zm.update(projected_grad=torch.tensor(g))
        moved = flat(zm) - before
        expected = -LR * np.sign(g) * noise_of(zm, 0)[0]
        assert np.allclose(moved, expected, rtol=2e-2 if g == 1e-6 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_meazo_first_step_is_bounded_for_several_queries(seed) -> None:
    """Projected gradients that nearly cancel make the printed second moment vanish, and the step explode; not ours."""
    queries = 4
    gs = np.random.default_rng(seed).normal(size=queries)
    gs -= gs.mean() * (1 - 1e-6)
    zm = wrap("meazo", queries=queries)
    before = flat(zm)
    zm.update(projected_grad=torch.tensor(gs))
    bound = np.sqrt(queries) * LR * np.linalg.norm(noise_of(zm, 0), axis=1).max()
    assert np.linalg.norm(flat(zm) - before) <= bound * 1.0001


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_fzoo_does_not_see_the_scale_of_the_loss(estimator) -> None:
    ends = []
    for scale in (1.0, 1024.0, 1e-3):
        zm = wrap("fzoo", queries=3, estimator=estimator)
        start = flat(zm)
        feed(zm, [scale * losses for losses in draw_losses(zm, 10)])
        ends.append(flat(zm))
    assert np.array_equal(ends[0], ends[1])  # a power of two: exactly
    assert np.linalg.norm(ends[2] - ends[0]) <= 1e-5 * np.linalg.norm(ends[0] - start)


@pytest.mark.parametrize("loss", [0.1, 1.0, 0.0])
def test_fzoo_skips_where_every_side_has_one_loss(loss) -> None:
    zm = wrap("fzoo", queries=3)
    before = flat(zm)
    assert zm.update(losses=torch.tensor([0.7, loss, loss, loss])).skipped
    assert np.array_equal(flat(zm), before)


def test_fzoo_brings_its_own_probes_and_the_user_decides() -> None:
    zm = wrap("fzoo")
    assert (zm.job.direction.name, zm.options.estimator, zm.job.queries) == ("rademacher", "forward", 8)
    zm = wrap("fzoo", direction="gaussian", estimator="central", queries=2)
    assert (zm.job.direction.name, zm.options.estimator, zm.job.queries) == ("gaussian", "central", 2)
    assert wrap("zo_sgd").job.direction.name == "gaussian"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fzoo", {"queries": 1}, "at least 2 losses"),
        ("hizoo", {"estimator": "forward"}, "estimator must be 'central'"),
        ("hizoo", {"direction": "unit_sphere"}, "use direction='sphere'"),
        ("conmezo", {"direction": "unit_sphere"}, "use direction='sphere'"),
    ],
)
def test_probes_that_make_no_sense_for_a_rule_are_refused(name, options, words) -> None:
    with pytest.raises(ZOError, match=words):
        wrap(name, **options)


def test_hizoo_evaluates_three_points_with_the_direction_it_updates_along() -> None:
    zm = wrap(rules.hizoo(a=1e-3))
    assert [(p.direction, p.coefficient) for p in zm.points] == [(0, 0.0), (0, 1.0), (0, -1.0)]
    feed(zm, draw_losses(zm, 3))
    assert any((h - 1).abs().max() > 1e-3 for h in zm.job.slots["H"])
    (query,) = zm.directions.queries
    probed = [zm.engine.direction(query, i) for i in range(len(zm.parameters))]
    before = [p.tensor.detach().clone() for p in zm.parameters]
    zm.lr = 1.0
    zm.update(projected_grad=torch.tensor(-1.0))
    for z, w, p in zip(probed, before, zm.parameters, strict=True):
        assert torch.equal(p.tensor, w + z)


def test_sums_over_slots_do_not_depend_on_the_runs_they_are_taken_in(monkeypatch) -> None:
    slots = {"m": torch.linspace(-1, 1, 35).reshape(5, 7), "v": torch.linspace(0, 3, 35).reshape(5, 7)}

    def reduce(part):
        return {"mv": part["m"] * part["v"], "square": part["m"].square()}

    whole = sum_slots(reduce, slots)
    monkeypatch.setattr(arithmetic, "REDUCE_ELEMENTS", 8)
    pieces = sum_slots(reduce, slots)
    assert whole["square"].dtype == torch.float64
    assert all(torch.allclose(whole[name], pieces[name], rtol=1e-12) for name in ("mv", "square"))


@pytest.mark.parametrize(("device", "pieces"), [("cpu", 64), ("cuda", 4)])
def test_sums_over_slots_are_taken_in_few_pieces_on_a_gpu(device: str, pieces: int) -> None:
    taken = []
    with FakeTensorMode():
        slots = {"m": torch.empty(1 << 13, 1 << 13, device=device)}
        sum_slots(lambda part: taken.append(part) or {"sum": part["m"]}, slots)
    assert len(taken) == pieces


def test_conmezo_warm_up_survives_in_the_state() -> None:
    zm = wrap(rules.conmezo(warmup=200))
    assert zm.state_dict()["scalars/all/warmup"] == 200
    assert wrap("conmezo").state_dict()["scalars/all/warmup"] == 0


def test_weight_decay_is_decoupled_and_skips_vectors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    zm = zowrap.zo_wrap(Two(), "zo_sgd", lr=0.1, weight_decay=0.5, loss_fn=lambda m, b: m.norm.sum(), engine="eager")
    zm.update(projected_grad=torch.tensor(0.0))
    assert torch.allclose(zm.model.matrix, torch.full((2, 2), 0.95))
    assert torch.equal(zm.model.norm, torch.ones(2))


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("meazo", {"lr": -1.0}, "lr must be a positive"),
        ("meazo", {"lr": float("nan")}, "lr must be a positive"),
        ("meazo", {"beta": 1.0}, "beta must lie in"),
        ("meazo", {"betta": 0.9}, "did you mean 'beta'"),
        ("meazo", {"zeta": 0}, "zeta must be a positive"),
        ("meazo", {"moment": "pinted"}, "did you mean 'printed'"),
        ("zo_sgd", {"momentum": -0.1}, "momentum must lie in"),
        ("zo_sgd", {"sign": "elemntwise"}, "did you mean 'elementwise'"),
        ("zo_adam", {"beta2": 1}, "zo_adam: beta2 must lie in"),
        ("zo_adam", {"beta": 0.9}, "did you mean 'beta"),
        ("zo_adam", {"zeta": -1e-8}, "zo_adam: zeta must be a positive"),
        ("zo_rmsprop", {"beta2": -0.1}, "zo_rmsprop: beta2 must lie in"),
        ("zo_rmsprop", {"beta1": 0.9}, "did you mean 'beta2'"),
        ("zo_adamm", {"amsgrad": 1}, "amsgrad must be True or False"),
        ("zo_adamm", {"amsgard": True}, "did you mean 'amsgrad'"),
        ("radazo", {"beta1": "0.9"}, "radazo: beta1 must lie in"),
        ("radazo", {"bias_correction": "no"}, "bias_correction must be True or False"),
        ("conmezo", {"theta": 1.6}, "theta must lie in (0, π/2]"),
        ("conmezo", {"theta": 0.0}, "theta must be a positive"),
        ("conmezo", {"warmup": True}, "warmup must be False or a whole number"),
        ("conmezo", {"warmup": 0}, "warmup must be False or a whole number"),
        ("conmezo", {"warm_up": 10}, "did you mean 'warmup'"),
        ("fzoo", {"lr": 0.0}, "fzoo: lr must be a positive"),
        ("fzoo", {"queries": 4}, "fzoo has no hyper-parameter 'queries'"),
        ("hizoo", {"a": 1.0}, "hizoo: a must lie in"),
        ("meaz", {}, "did you mean 'meazo'"),
        ("hizo", {}, "did you mean 'hizoo'"),
    ],
)
def test_bad_hyper_parameters_are_named(name, hyper, words) -> None:
    with pytest.raises(ZOError, match=words.replace("(", r"\(")):
        rules.get(name, **hyper)


@pytest.mark.parametrize("name", rules.REGISTRY)
def test_registry_is_complete(name) -> None:
    entry = rules.REGISTRY[name]
    rule = entry.constructor()
    assert rule.name == name and entry.summary() and entry.paper
    assert set(entry.defaults()) == {"lr", *rule.hyper}
    rules.get(name, **rule.hyper)  # what a journal records builds the rule again
    zm = wrap(rule)
    q = zm.job.queries
    assert len(zm.points) == {"2q": 2 * q, "q + 1": q + 1, "2q + 1": 2 * q + 1}[entry.forwards]
    elements = sum(t.numel() for slot in rule.slot_names("element") for t in zm.job.slots[slot])
    assert elements == int(entry.memory.split()[0]) * sum(p.tensor.numel() for p in zm.parameters)
    assert zm.eps == EPS
