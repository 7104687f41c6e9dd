"""Every rule has the properties of :mod:`zowrap.testing` under both engines; a rule that lacks one is found out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.rule_cases import KINDS, name_of
from zowrap import rules, testing
from zowrap.names import ENGINES
from zowrap.rules import Rule, Slot
from zowrap.rules.base import mean_gradient

# 16-bit kernels are compiled apart, seconds for each rule: once for each rule is enough.
SWEEP = [
    pytest.param(case, engine, check, id=f"{check}-{engine}-{name_of(case)}")
    for case in KINDS
    for engine in ENGINES
    for check in testing.PROPERTIES
    if not (check == "keeps_the_dtype_of_the_weights" and engine == "compiled" and case[1])
]


@pytest.mark.parametrize(("case", "engine", "check"), SWEEP)
def test_every_rule_has_every_property(case, engine, check) -> None:
    name, hyper, _ = case
    testing.PROPERTIES[check](rules.get(name, **hyper), engine)


def test_every_rule_is_among_the_cases() -> None:
    assert {name for name, hyper, _ in KINDS if not hyper} == set(rules.REGISTRY)


# --- rules with one mistake each -----------------------------------------------------------------------------------


def scalars(state, probe, hyper):
    return state, {"g": mean_gradient(probe)}


def leaf(w, g, slots, c, hyper):
    m = 0.9 * slots["m"] + g
    return w - hyper["lr"] * m, {"m": m}


SOUND = Rule(name="mine", lr=1e-3, hyper={}, scalars=scalars, leaf=leaf, slots={"m": Slot()})


def frozen_lr(w, g, slots, c, hyper):
    return leaf(w, g, slots, c, {"lr": 1e-3})


def in_place(w, g, slots, c, hyper):
    m = slots["m"].mul_(0.9).add_(g)
    return w - hyper["lr"] * m, {"m": m}


def at_random(w, g, slots, c, hyper):
    return leaf(w, g * torch.rand_like(g), slots, c, hyper)


def with_a_branch(w, g, slots, c, hyper):
    return leaf(w, g if g.sum() > 0 else -g, slots, c, hyper)


def standing_still(w, g, slots, c, hyper):
    return w, slots


def remembering() -> Rule:
    seen: list[float] = []

    def hidden(state, probe, hyper):
        seen.append(float(probe.losses[0]))
        return state, {"g": mean_gradient(probe) * len(seen)}

    return replace(SOUND, scalars=hidden)


def widening(state, probe, hyper):
    return {"v": probe.losses}, {"g": mean_gradient(probe)}


@pytest.mark.parametrize(
    ("rule", "engine", "words"),
    [
        (replace(SOUND, leaf=frozen_lr), "eager", "the weights move although lr is 0"),
        (replace(SOUND, leaf=in_place), "eager", "slots/m/layers.0.weight changes in a step that is skipped"),
        (replace(SOUND, leaf=at_random), "eager", "eager and eager end"),
        (replace(SOUND, leaf=standing_still), "eager", "the weights moved by 0.0"),
        (replace(SOUND, leaf=with_a_branch), "compiled", "follows_the_eager_engine under the compiled engine fails"),
        (remembering(), "eager", "eager and eager end|differs once resumed"),
        (replace(SOUND, scalars=widening, state={"v": 0.0}), "eager", "fails with RuntimeError"),
    ],
    ids=["frozen lr", "in place", "at random", "standing still", "branch", "remembering", "widening"],
)
def test_a_mistake_is_named(rule, engine, words) -> None:
    with pytest.raises(AssertionError, match=words):
        testing.check_rule(rule, engines=[engine])


def test_a_rule_without_a_mistake_passes() -> None:
    testing.check_rule(SOUND)


def test_a_claim_about_the_scale_of_the_loss_is_checked(monkeypatch) -> None:
    monkeypatch.setitem(rules.REGISTRY, "mine", rules.Entry(lambda: SOUND, "nobody", "1", "2q", True))
    with pytest.raises(AssertionError, match="scale_free=True, but with a loss times 1024"):
        testing.check_rule(SOUND, engines=["eager"])
    entry = replace(rules.REGISTRY["meazo"], scale_free=False)
    monkeypatch.setitem(rules.REGISTRY, "meazo", entry)
    with pytest.raises(AssertionError, match="scale_free=False, but"):
        testing.check_rule(rules.meazo(), engines=["eager"])
