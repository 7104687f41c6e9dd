"""The measuring tools: what they count and what they refuse. Times themselves are never tested."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from zowrap.bench import architectures, contenders, measure
from zowrap.cli import main
from zowrap.errors import ZOError


@pytest.mark.parametrize(
    "options",
    [
        ["--arch", "opt-125n"],
        ["--batch", "0"],
        ["--dtype", "int8"],
        ["--row", "gausian", "--row", "meazo"],
        ["--row", "meazo, rademachr"],
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence_before_anything_is_compiled(
    options, capsys, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(contenders, "_compile_loss", refuse)
    monkeypatch.setattr(contenders, "_make_ours", refuse)
    assert main(["bench", "step", *options, "--json"]) == 2
    assert options[1].split(", ")[-1] in json.loads(capsys.readouterr().out)["error"]


def test_a_row_that_is_given_twice_is_timed_once(capsys, monkeypatch) -> None:
    monkeypatch.setattr(contenders, "make_contender", lambda name, *_: contenders.Contender(name, lambda: None))
    rows = ["--row", "classic MeZO", "--row", "meazo", "--row", "meazo"]
    assert main(["bench", "step", "--arch", "opt-tiny", "--together", "--rounds", "2", "--json", *rows]) == 0
    assert [r["row"] for r in json.loads(capsys.readouterr().out)["rows"]] == [*contenders.PLAIN, "meazo"]
    assert contenders.list_names([]) == list(contenders.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "rule", "direction", "blocks"),
    [
        ("hizoo", "hizoo", "gaussian", 1),
        ("zo_adam, rademacher", "zo_adam", "rademacher", 1),
        ("mezo, sphere, one layer per step", "zo_sgd", "sphere", 5),
    ],
)
def test_a_row_is_any_rule_direction_and_blocks(row, rule, direction, blocks) -> None:
    model = architectures.build_model("opt-tiny")
    zm = contenders.make_contender(row, model, architectures.make_batch(model, 2, 8)).wrapped
    assert (zm.rule.name, zm.job.direction.name, len(zm.job.blocks)) == (rule, direction, blocks)
    assert zm.inspect().schedule == "paired"


def test_a_row_may_name_an_estimator_and_queries() -> None:
    row = contenders._find_row("mezo, forward, rademacher, 15 queries, one layer per step")
    assert row.options == {
        "rule": "mezo",
        "estimator": "forward",
        "direction": "rademacher",
        "queries": 15,
        "blocks": "layer",
    }
    with pytest.raises(ZOError, match="unknown direction 'many queries'"):
        contenders._find_row("mezo, many queries")


def test_a_row_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ZOError, match="window of 64"):
        architectures.make_batch(architectures.build_model("opt-tiny"), 2, 65)


def test_classic_mezo_is_the_published_step() -> None:
    """θ + εz, θ − εz, back, then −η g z: after one step the weights moved by exactly that, to rounding."""
    torch.manual_seed(3)
    model = torch.nn.Linear(5, 4).double()
    start = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.ones(3, 5).double()
    mezo = contenders.ClassicMeZO(model, lambda: model(x).square().sum(), lr=0.1, eps=1e-3)
    mezo.step()
    torch.manual_seed(0)
    z = {name: torch.normal(0.0, 1.0, p.shape, dtype=torch.float64) for name, p in model.named_parameters()}

    def loss(sign: float) -> torch.Tensor:
        return (
            (x @ (start["weight"] + sign * 1e-3 * z["weight"]).T + start["bias"] + sign * 1e-3 * z["bias"])
            .square()
            .sum()
        )

    g = (loss(1) - loss(-1)) / 2e-3
    for name, p in model.named_parameters():
        assert torch.allclose(p, start[name] - 0.1 * g * z[name], atol=1e-9)


def test_a_ratio_is_to_the_yardstick_just_before_and_after(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def lasting(*seconds: float):
        given = iter(seconds)

        def step() -> None:
            clock[0] += next(given)

        return step

    yardstick = contenders.Contender(contenders.YARDSTICK, lasting(1.0, 3.0, 1.0, 1.0, 2.0, 2.0))
    first = contenders.Contender("first", lasting(4.0, 1.0))
    second = contenders.Contender("second", lasting(1.0, 8.0), per_call=4)
    times = measure.time_interleaved([yardstick, first, second], 2)
    assert [ratio for _, ratio in times["first"]] == [2.0, 2 / 3]
    assert times["second"] == [(0.25, 0.125), (2.0, 1.0)]
    assert measure.summarise_spread([3.0, 1.0, 2.0])["median"] == 2.0


def test_a_peak_is_that_of_steps_which_allocate_where_the_model_lies(monkeypatch) -> None:
    """A GPU beside a model on the CPU is not asked, and a replay, which allocates nothing, is not measured."""
    seen = []
    zm = SimpleNamespace(graphs="recorder")
    contender = contenders.Contender("ours", lambda: seen.append(("step", zm.graphs)), wrapped=zm)
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: seen.append((name, device)) or 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measure.measure_peak_bytes(contender, torch.device("cpu"), steps=1)
    step, gpu = ("step", None), torch.device("cuda", 1)
    assert seen == [step, step] and zm.graphs == "recorder"
    seen.clear()
    assert measure.measure_peak_bytes(contender, gpu, steps=1) == 0
    before = [(name, gpu) for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated")]
    assert seen == [step, *before, step, ("synchronize", gpu), ("max_memory_allocated", gpu)]
    assert zm.graphs == "recorder"


@pytest.mark.parametrize("name", ["two compiled forwards", "classic MeZO"])
def test_the_peak_of_graphs_that_others_recorded_is_not_known(monkeypatch, name) -> None:
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, **_: modes.append(mode) or function)
    model = architectures.build_model("opt-tiny")
    batch = architectures.make_batch(model, 2, 8)
    assert not contenders.make_contender(name, model, batch).replays
    monkeypatch.setattr(contenders, "_on_gpu", lambda model: True)
    contender = contenders.make_contender(name, model, batch)
    assert modes == [None, "reduce-overhead"]
    assert contender.replays and measure.measure_peak_bytes(contender, torch.device("cuda")) is None
