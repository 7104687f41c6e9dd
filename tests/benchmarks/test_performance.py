"""The performance page and the machinery behind it; times themselves are never tested."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.performance import __main__, docs, growth, operators, profile
from zowrap.bench import architectures, contenders
from zowrap.ops import scratch
from zowrap.step.parameters import matches


def test_the_page_is_what_the_kept_results_make() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page()


def test_the_table_of_a_step_is_of_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    monkeypatch.setattr(__main__, "bench", lambda *options: asked.append(options) or {"rows": []})
    monkeypatch.setattr(sys, "argv", ["performance", "step", "--rounds", "3"])
    __main__.main()
    (options,) = asked
    assert options[-2:] == ("--rounds", "3") and "--row" not in options  # without --row: all
    assert contenders.list_names([]) == list(contenders.NAMES) and len(contenders.NAMES) == 18
    assert (tmp_path / "step.json").exists()


def test_the_page_names_the_rows_that_the_kept_files_lack() -> None:
    *kept, last = contenders.NAMES
    step = {"rounds": 3, "rows": [{"row": name} for name in kept]}
    assert " ".join(docs._list_missing_rows(step).split()) == (
        f"This table, timed in 3 rounds, lacks these rows of `zowrap bench step`: `{last}`."
    )
    assert docs._list_missing_rows({"rounds": 3, "rows": [{"row": name} for name in contenders.NAMES]}) == ""


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


@pytest.mark.slow
def test_the_tables_of_parts_are_made_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "ELEMENTS": 256,
        "TOKENS": 8,
        "LONG": 16,
        "WIDTH": 16,
        "INNER": 32,
        "VOCABULARY": 40,
        "LAYERS": 1,
        "CHUNKS": (8, 16),
        "HEAD_CHUNKS": (8, 16),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(operators, name, value)
    kept = scratch.CHUNK_ROWS, scratch.LEAST_ELEMENTS
    found = operators.run(1)
    assert kept == (scratch.CHUNK_ROWS, scratch.LEAST_ELEMENTS)
    assert [row["law"] for row in found["laws"]] == list(operators.LAWS)
    assert all(0 < row["per_second"] < math.inf for row in found["laws"])
    assert {(row["tokens"], row["part"], row["rows"]) for row in found["chunks"]} == {
        (tokens, part, rows) for tokens in (8, 16) for part in ("layers", "head") for rows in (0, 8, 16)
    }
    assert all(row["seconds"] > 0 for row in found["deferred"]) and all(row["stacked"] > 0 for row in found["stacked"])
    assert docs._operators(found).count("\n| --- |") == 4


@pytest.mark.slow
def test_a_profile_tells_kinds_of_work_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    build = architectures.build_model
    monkeypatch.setattr(architectures, "build_model", lambda name: build("opt-tiny"))
    monkeypatch.setattr(profile, "SIZES", ((2, 8), (2, 16)))
    found = profile.run(1)
    assert [(row["tokens"], row["row"]) for row in found["profile"]] == [
        (tokens, row) for tokens in (16, 32) for row in (contenders.YARDSTICK, "gaussian")
    ]
    plain, ours = (row["seconds"] for row in found["profile"][:2])
    only_ours = {profile.PERTURBATION, profile.LOOPS, profile.UPDATE}
    assert {kind for kind in profile.KINDS if not plain[kind]} == only_ours and all(ours[kind] for kind in only_ours)
    assert docs._profile(found).count(" tokens: two forwards") == 2


@pytest.mark.slow
def test_a_case_of_growth_counts_what_it_times() -> None:
    found = growth.measure_one(1, width=128, batch=(1, 8), queries=2)
    assert (found["tokens"], found["queries"], found["blocks"]) == (8, 2, 1)
    assert found["ratio"]["median"] > 0
