"""What a rule holds in memory, measured, is what the algorithms say; and a compiled step holds next to nothing more."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import zowrap
from tests.conftest import Outcome
from tests.support.slow import slow_except
from zowrap import rules
from zowrap.bench import rule_memory
from zowrap.rules import Rule
from zowrap.step import arithmetic

# Extra memory in P, the tuned weights in float32, as the papers' algorithms need it; a share below 1 % counts as 0.
EXPECTED = {
    "zo_sgd": 0,
    "zo_rmsprop": 1,
    "zo_adam": 2,
    "zo_adamm": 3,
    "radazo": 2,
    "meazo": 0,
    "conmezo": 1,
    "fzoo": 0,
    "hizoo": 1,
    "lozo": 0,
    "lozo_m": 0,
    "sparse_mezo": 0,
}
VARIANTS: list[tuple[Rule, int]] = [(rules.zo_sgd(momentum=0.9), 1), (rules.zo_adamm(amsgrad=False), 2)]


LOW_RANK = ("lozo", "lozo_m")


def test_low_rank_rules_hold_less_than_a_hundredth_of_a_matrix_of_2048() -> None:
    assert all(
        0 < held < 0.01 for held in rule_memory.measure_extra_memory([rules.get(name) for name in LOW_RANK], side=2048)
    )


def test_each_rule_holds_what_its_algorithm_needs() -> None:
    cases = [(e.constructor(), EXPECTED[name]) for name, e in rules.REGISTRY.items() if name not in LOW_RANK] + VARIANTS
    held = rule_memory.measure_extra_memory([rule for rule, _ in cases])
    for (rule, expected), found in zip(cases, held, strict=True):
        assert expected <= found < expected + 0.01, rule.describe()


@pytest.mark.parametrize("name", rules.REGISTRY)
def test_the_registry_states_it(name) -> None:
    assert rules.REGISTRY[name].memory.split()[0] == str(EXPECTED[name])


def test_what_a_rule_hides_from_its_slots_is_counted_too() -> None:
    kept: list[torch.Tensor] = []

    def hoarding(w, g, slots, c, hyper):
        kept.append(g.clone())
        return w - hyper["lr"] * g, slots

    honest = rules.zo_sgd()
    rule = Rule(name="hoarder", lr=1e-6, hyper={}, scalars=honest.scalars, leaf=hoarding)
    assert rule_memory.measure_extra_memory([rule]) == pytest.approx([1.0], abs=0.01)


def allocated(act: Any) -> tuple[int, int]:
    """Bytes still held and bytes held at most, as torch's allocator counts them while ``act`` runs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        act()
        gc.collect()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert events
    return live, peak


NAMED = ("zo_sgd", "meazo", "fzoo", "lozo", "conmezo", "radazo")


@pytest.mark.parametrize("name", slow_except(["zo_sgd"], [name for name in NAMED if name in rules.REGISTRY]))
def test_a_compiled_step_needs_no_memory_of_the_weights_size(name, monkeypatch) -> None:
    """Neither a direction nor a gradient nor a perturbed weight exists whole, in the evaluations or the update."""
    monkeypatch.setattr(arithmetic, "REDUCE_ELEMENTS", 1 << 10)  # a fixed 12 MiB otherwise, more than this whole model
    side = 1024
    zm = zowrap.zo_wrap(
        nn.Linear(side, side, bias=False), name, engine="compiled", loss_fn=lambda m, b: m(b["x"]).square().mean(-1)
    )
    batch = {"x": torch.ones(1, side)}
    zm.step(**batch)  # compiles
    assert zm.inspect().engine == "compiled"
    for act in (lambda: zm.accumulate(**batch), lambda: zm.update()):
        held, peak = allocated(act)
        assert held <= peak < 0.01 * 4 * side**2, act


def test_the_table_prints_what_was_measured(zowrap_cli) -> None:
    told: Outcome = zowrap_cli("rules", "--json")
    for each in told.json["rules"]:
        assert each["memory_measured"] == pytest.approx(EXPECTED[each["name"]], abs=0.04)
        assert each["state"] == list(rules.REGISTRY[each["name"]].constructor().slots)
    text = zowrap_cli("rules").out
    for name, entry in rules.REGISTRY.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert entry.forwards in row and entry.paper in row
        measured = float(re.search(r" (\d\.\d\d)  ", row)[1])
        assert measured == pytest.approx(EXPECTED[name], abs=0.04)
        assert f"    {', '.join(f'{k}={v}' for k, v in entry.defaults().items())}" in text.splitlines()
