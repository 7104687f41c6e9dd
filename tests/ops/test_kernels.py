"""Runs share compiled kernels if and only if their arithmetic is certain to be the same."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zowrap
from zowrap import rules
from zowrap.ops.kernels import Kernels, register
from zowrap.rules.base import Rule, with_masters
from zowrap.step import directions


def hand_made(factor: float) -> Rule:
    """Make a rule with a fixed name and a body that depends on ``factor``."""

    def leaf(w, g, slots, c, hyper):
        return w - factor * hyper["lr"] * g, slots

    return Rule(name="zo_sgd", lr=1e-6, hyper=rules.zo_sgd().hyper, scalars=rules.zo_sgd().scalars, leaf=leaf)


def key(rule: Rule, direction: str | directions.Direction = "gaussian", queries: int = 1) -> str:
    law = directions.get(direction)
    shaped = rule if law.shape is None else law.shape(rule)
    return Kernels(shaped, law, {"g": (queries,)}, []).key


SHAPING = ["gaussian", "cone(1.0)", "sparse(0.5)"]


@pytest.mark.parametrize("direction", SHAPING)
@pytest.mark.parametrize("name", ["zo_sgd", "zo_adam", "meazo", "lozo"])
def test_our_rules_of_equal_hyper_parameters_share(name: str, direction: str) -> None:
    rule = rules.get(name)
    assert key(rule, direction) == key(rules.get(name, lr=0.5), direction)  # η is an input
    assert key(with_masters(rule), direction) == key(with_masters(rules.get(name)), direction)
    assert key(with_masters(rule), direction) != key(rule, direction)


@pytest.mark.parametrize("name", list(rules.REGISTRY))
def test_every_rule_of_ours_says_where_it_is_from(name: str) -> None:
    one, other = rules.get(name), rules.get(name)
    assert isinstance(one.origin, str) and one.origin == other.origin and one.origin.startswith(f"{name}(")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (rules.zo_sgd(momentum=0.5), rules.zo_sgd(momentum=0.6)),
        (rules.zo_sgd(sign="scalar"), rules.zo_sgd(sign="elementwise")),
        (rules.conmezo(theta=1.0), rules.conmezo(theta=1.1)),
        (rules.conmezo(warmup=1), rules.conmezo(warmup=2)),
        (rules.sparse_mezo(sparsity=0.5), rules.sparse_mezo(sparsity=0.6)),
        (rules.zo_adam(), rules.zo_rmsprop()),
    ],
)
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_other_hyper_parameters_do_not(one: Rule, other: Rule, direction: str) -> None:
    assert key(one, direction) != key(other, direction)


def test_other_directions_do_not() -> None:
    names = [
        "gaussian",
        "rademacher",
        "sphere",
        "lowrank(1)",
        *SHAPING[1:],
        "cone(1.1)",
        "cone(1.0, 0.5)",
        "sparse(0.6)",
    ]
    assert len({key(rules.zo_sgd(), name) for name in names}) == len(names)
    assert key(rules.zo_sgd(), "cone(1.0)") == key(rules.zo_sgd(), " cone( theta = 1.0 )")
    mine = directions.Direction("gaussian", "rademacher")  # a name identifies nothing
    assert key(rules.zo_sgd(), mine) != key(rules.zo_sgd())
    assert key(rules.zo_sgd(), directions.Direction("gaussian", scale=lambda *_: torch.ones(()))) != key(rules.zo_sgd())


def test_other_shapes_do_not() -> None:
    assert key(rules.zo_sgd(), queries=2) != key(rules.zo_sgd(), queries=1)


@pytest.mark.parametrize("wrapped", [lambda rule: rule, with_masters], ids=["plain", "with masters"])
@pytest.mark.parametrize("direction", SHAPING)
def test_rules_from_elsewhere_never_share(direction: str, wrapped: Callable[[Rule], Rule]) -> None:
    """They differ from each other and from the rule of ours with the same name and hyper-parameters."""
    made = [wrapped(each) for each in (hand_made(1.0), hand_made(2.0), rules.zo_sgd())]
    assert made[0].describe() == made[1].describe() == made[2].describe()
    assert len({key(rule, direction) for rule in made}) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda rule: dataclasses.replace(rule, leaf=hand_made(3.0).leaf),
        lambda rule: dataclasses.replace(rule, direction=lambda u, w, slots, scalars: 2 * u),
        copy.deepcopy,
    ],
    ids=["leaf", "direction", "copy"],
)
def test_a_changed_copy_of_a_rule_does_not_pass_for_it(change: Callable[[Rule], Rule]) -> None:
    rule = rules.zo_sgd()
    changed = change(rule)
    assert (key(changed) == key(rule)) == (change is copy.deepcopy)  # a deep copy has the same functions
    assert key(change(hand_made(1.0))) not in {key(hand_made(1.0)), key(rule)}


def test_a_rule_from_elsewhere_shares_with_itself() -> None:
    rule = hand_made(1.0)
    assert key(rule) == key(rule)


def test_registered_kernels_are_those_of_the_first_of_a_key() -> None:
    law = directions.get("gaussian")
    first = register(Kernels(rules.zo_sgd(momentum=0.321), law, {"g": (1,)}, []))
    assert register(Kernels(rules.zo_sgd(momentum=0.321, lr=1.0), law, {"g": (1,)}, [])) is first
    one, other = (register(Kernels(hand_made(f), law, {"g": (1,)}, [])) for f in (1.0, 2.0))
    assert one is not other


@pytest.mark.parametrize("direction", SHAPING)
def test_engines_share_by_the_key(direction: str) -> None:
    def engine(rule: Rule) -> Any:
        options = {"direction": direction, "engine": "compiled", "loss_fn": lambda m, b: m(b["x"]).sum(-1)}
        return zowrap.zo_wrap(torch.nn.Linear(3, 2), rule, **options).engine

    assert engine(rules.zo_sgd()).kernels is engine(rules.zo_sgd(lr=1.0)).kernels
    assert engine(hand_made(1.0)).kernels is not engine(hand_made(2.0)).kernels
