"""The performance page and the machinery behind it; times themselves are never tested."""

from __future__ import annotations

from benchmarks.performance import docs, growth, operators
from zowrap.parameters import matches


def test_the_page_is_what_the_kept_results_make() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page()


def test_every_axis_of_growth_has_its_cases() -> None:
    axes = [axis for axis, _, _ in growth.cases()]
    assert {axis: axes.count(axis) for axis in axes} == {"parameters": 3, "tokens": 4, "queries": 3, "blocks": 3}


def test_blocks_split_the_layers_evenly() -> None:
    patterns = growth._blocks(4)
    assert patterns is not None
    assert [p for p in patterns if matches(p, "model.layers.5.fc1.weight")] == [patterns[2]]


def test_a_round_before_the_first_is_not_counted() -> None:
    calls: list[str] = []
    found = operators.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, repeats=3)
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}
    assert calls == (["a"] * 3 + ["b"] * 3) * 3
