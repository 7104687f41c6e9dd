"""Each rule equals its formula, written again in NumPy; MEAZO's first step is bounded; bad values are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import zowrap
from zowrap import noise, rules
from zowrap.errors import ZOError

SHAPE, LR = (5, 3), 0.05


class Vector(nn.Module):
    """One weight matrix; the loss is never evaluated here."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 15).reshape(SHAPE))


def wrap(rule, queries=1, **options):
    return zowrap.zo_wrap(
        Vector(), rule, queries=queries, loss_fn=lambda m, b: m.w.sum(), engine="eager", **({"lr": LR} | options)
    )


def directions_of(zm, step, queries):
    ids = torch.tensor([p.id for p in zm.parameters])
    keys = [noise.derive_keys(zm.seed, step, q, ids, noise.TAG_DIRECTION)[0] for q in range(queries)]
    return [noise.draw("gaussian", k, SHAPE).double().numpy() for k in keys]


def np_zo_sgd(w, history, momentum=0.0, sign=None):
    b = np.zeros_like(w)
    for gs, zs in history:
        gs = np.sign(gs) if sign == "scalar" else gs
        g = sum(a * z for a, z in zip(gs, zs, strict=True)) / len(gs)
        g = np.sign(g) if sign == "elementwise" else g
        b = momentum * b + g
        w = w - LR * b
    return w


def np_meazo(w, history, beta=0.99, zeta=1e-8, moment="mean", literal=False):
    v = 0.0
    for t, (gs, zs) in enumerate(history, start=1):
        s = np.mean(gs) ** 2 if moment == "printed" else np.mean(np.square(gs)) / len(gs)
        v = beta * v + (1 - beta) * s
        n = max(t - 1, 1) if literal else t
        w = w - LR / (np.sqrt(v / (1 - beta**n)) + zeta) * sum(a * z for a, z in zip(gs, zs, strict=True)) / len(gs)
    return w


CASES = [
    ("zo_sgd", {}, np_zo_sgd),
    ("zo_sgd", {"momentum": 0.9}, np_zo_sgd),
    ("zo_sgd", {"sign": "scalar"}, np_zo_sgd),
    ("zo_sgd", {"sign": "elementwise"}, np_zo_sgd),
    ("meazo", {}, np_meazo),
    ("meazo", {"beta": 0.9, "moment": "printed"}, np_meazo),
    ("meazo", {"literal": True}, np_meazo),
]


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize(("name", "hyper", "reference"), CASES)
def test_rule_equals_numpy(name, hyper, reference, queries) -> None:
    zm = wrap(rules.get(name, **hyper), queries)
    start = zm.model.w.detach().double().numpy().copy()
    draw = np.random.default_rng(0)
    history = []
    for step in range(30):
        gs = draw.normal(size=queries) * 10 ** draw.uniform(-2, 2)
        history.append((np.float32(gs).astype(np.float64), directions_of(zm, step, queries)))
        zm.update(projected_grad=torch.tensor(gs))
    expected = reference(start, history, **hyper)
    moved = np.linalg.norm(expected - start)
    assert moved > 0
    assert np.linalg.norm(zm.model.w.detach().numpy() - expected) <= 1e-5 * moved


def test_mezo_is_zo_sgd() -> None:
    assert rules.mezo is rules.zo_sgd
    assert rules.get("mezo").name == "zo_sgd"


def test_meazo_first_step_is_the_signed_direction() -> None:
    for g in (1e-6, -3.0, 4e7):
        zm = wrap("meazo")
        before = zm.model.w.detach().clone()
        zm.update(projected_grad=torch.tensor(g))
        (z,) = directions_of(zm, 0, 1)
        step = (zm.model.w.detach() - before).double().numpy()
        assert np.allclose(step, -LR * np.sign(g) * z, rtol=2e-2 if g == 1e-6 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_meazo_first_step_is_bounded_for_several_queries(seed) -> None:
    """Projected gradients that nearly cancel make the printed second moment vanish, and the step explode; not ours."""
    queries = 4
    gs = np.random.default_rng(seed).normal(size=queries)
    gs -= gs.mean() * (1 - 1e-6)
    zm = wrap("meazo", queries)
    before = zm.model.w.detach().clone()
    zm.update(projected_grad=torch.tensor(gs))
    moved = (zm.model.w.detach() - before).double().norm().item()
    assert moved <= np.sqrt(queries) * LR * max(np.linalg.norm(z) for z in directions_of(zm, 0, queries)) * 1.0001


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
        ("meaz", {}, "did you mean 'meazo'"),
    ],
)
def test_bad_hyper_parameters_are_named(name, hyper, words) -> None:
    with pytest.raises(ZOError, match=words.replace("(", r"\(")):
        rules.get(name, **hyper)


def test_registry_is_complete() -> None:
    for name, entry in rules.REGISTRY.items():
        assert entry.constructor().name == name
        assert entry.summary() and entry.paper
