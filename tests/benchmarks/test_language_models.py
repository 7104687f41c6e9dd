"""E6 and E7 from end to end on a tiny encoder: what they measure and say, and that they go on where they were."""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import alignment, docs, e6, e6_report, e6_run, e7, e7_report, e7_run
from benchmarks.papers.finetune import Cell, Workbench, rule_of, variant
from benchmarks.papers.spread import compare, resolution_of_accuracy
from tests.conftest import reviews, write_rows
from zowrap.errors import ZOError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reviews under the name of TREC, which has no dev file."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "trec").mkdir()
    write_rows(folder / "trec" / "train.jsonl", reviews(300))
    write_rows(folder / "trec" / "test.jsonl", reviews(20, seed=1))
    return folder


def options(module: Any, *arguments: Any) -> argparse.Namespace:
    """As ``__main__`` makes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    module.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def common(models: dict[str, Path], data_dir: Path, tmp_path: Path) -> list[Any]:
    return ["--model", models["encoder"], "--data-dir", data_dir, "--out", tmp_path, "--batch-size", 4, "--steps", 6]


def test_e6_compares_rules_and_goes_on_where_it_was(common, tmp_path, capsys):
    more = ("--tasks", "trec", "--rules", "zo_sgd", "meazo", "meazo_blocks", "hizoo", "--seeds", 2, "--extensions", 0)
    given = options(e6, *common, *more, "--engine", "eager")
    result = json.loads(json.dumps(e6.run(given), allow_nan=False))
    runs = result["tasks"]["trec"]["rules"]
    assert {line["forwards"] for rule in runs.values() for line in rule["grid"]} == {12}  # hizoo: 4 steps of 3
    assert [line["seed"] for line in runs["meazo"]["seeds"]] == [0, 1]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4 * (3 + 1) + 1  # and the untuned model
    capsys.readouterr()
    assert json.loads(json.dumps(e6.run(given))) == result
    assert capsys.readouterr().err == ""  # nothing was run again
    fewer = ("--tasks", "trec", "--rules", "zo_sgd", "radazo", "--seeds", 2, "--extensions", 0, "--finished")
    partly = e6.run(options(e6, *common, *fewer))
    assert (list(partly["tasks"]["trec"]["rules"]), partly["tasks"]["trec"]["unfinished"]) == (["zo_sgd"], ["radazo"])
    assert "Not measured: `radazo`" in e6.report(partly)
    text = e6.report(result)
    assert '`meazo` with blocks="layer"' in text and "Conclusion" in text
    e6.plot(result, tmp_path / "e6.svg")
    assert (tmp_path / "e6.svg").stat().st_size < 200_000


def test_e6_quick(common, tmp_path):
    result = e6.run(options(e6, *common, "--quick"))
    assert not (tmp_path / "cells.jsonl").exists()
    assert "says nothing about the rules" in e6.report(result)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--rules", "meazoo"], "meazo"),
        (["--tasks", "trek"], "trec"),
        (["--seeds", 0], "--seeds"),
        (["--data-dir", "nowhere"], "--data-dir"),
    ],
)
def test_e6_names_what_is_wrong(common, wrong, said):
    with pytest.raises(ZOError, match=said):
        e6.run(options(e6, *common, *wrong))


def test_rules_that_this_version_lacks_are_left_out_and_named(common, monkeypatch, capsys):
    monkeypatch.setattr(e6_run, "RULES", (*e6_run.RULES, "unborn"))
    given = options(e6, *common, "--tasks", "trec", "--rules", "unborn")
    result = e6.run(given)
    assert "unborn is left out" in capsys.readouterr().err
    assert result["missing"] == ["unborn"]
    assert "unborn" in e6.report(result)


def test_e7_quick(common, tmp_path):
    result = json.loads(json.dumps(e7.run(options(e7, *common, "--quick")), allow_nan=False))
    text = e7.report(result)
    for title in ("Coefficient of variation", "Alignment", "Robustness", "ConMeZO", "block directions"):
        assert title in text
    e7.plot(result, tmp_path / "e7.svg")
    assert (tmp_path / "e7.svg").stat().st_size < 200_000


@pytest.fixture
def bench(models, data_dir) -> Workbench:
    return Workbench(cell_of(models), data_dir, engine="eager")


def cell_of(models: dict[str, Path], rule: str = "zo_sgd", **fields: Any) -> Cell:
    size = {"steps": 20, "batch_size": 4, "dev_rows": 20, "test_rows": 20}
    return Cell("trec", rule, **{"lr": 1e-3, "seed": 0, **size, "model": str(models["encoder"]), **fields})


def test_the_gradient_is_what_a_small_step_along_it_changes(bench, models):
    zm = bench.reset(cell_of(models))
    batch = alignment.reference_batch(bench, 16)
    truth = alignment.compute_gradient(zm, batch)
    before = float(zm.loss(**batch))
    with torch.no_grad():
        for parameter, g in zip(zm.parameters, truth, strict=True):
            parameter.tensor.sub_(1e-3 * g)
    assert before - float(zm.loss(**batch)) == pytest.approx(1e-3 * alignment.inner_product(truth, truth), rel=0.05)


def test_a_single_estimate_is_recovered_from_the_momentum(bench, models):
    """At β = 0 the momentum is g z, and the cosine of both with ∇f is the same."""
    cell = cell_of(models, "radazo(beta1=0.0)", steps=4)
    assert all(
        look["m"] == pytest.approx(look["gz"], abs=1e-6) for look in alignment.measure_momentum(bench, cell, 0.0, 2, 16)
    )


def test_the_second_moment_of_gaussian_directions_varies_as_chi_square_noise(bench, models):
    cell = cell_of(models, "zo_adam", lr=1e-5)
    looks = alignment.measure_second_moment(bench, cell, rule_of("zo_adam", 1).hyper["beta2"], 10, 16)
    assert [look["step"] for look in looks] == [10, 20]
    assert all(look["v"] == pytest.approx(look["noise"], rel=0.1) for look in looks)


def test_subspaces_of_a_known_gradient(bench, models):
    zm = bench.reset(cell_of(models))
    truth = [torch.zeros_like(p.tensor) for p in zm.parameters]
    truth[0].flatten()[0] = 3.0  # all of it in one element of the first block
    kept = [torch.zeros_like(t) for t in truth]
    kept[0].flatten()[0] = 1.0
    found = alignment.measure_subspaces(zm, truth, kept, rank=2)
    d = sum(t.numel() for t in truth)
    assert (found["full"]["stable_rank"], found["full"]["gain"]) == (d, 1.0)
    assert (found["sparse"]["stable_rank"], found["sparse"]["overlap"], found["sparse"]["gain"]) == (1.0, 1.0, d)
    assert found["block"]["overlap"] == pytest.approx(1 / 2)  # two layers of one size, one of them sees it
    assert found["block"]["gain"] == pytest.approx(1.0)
    assert found["block"]["most_gain"] == pytest.approx(2.0)
    assert 0 < found["lowrank"]["overlap"] < 1


def test_differences_count_from_the_spread_on_that_seeds_leave():
    noise = ([0.01, -0.01, 0.0], [-0.01, 0.0, 0.01], [0.0, 0.01, -0.01])
    seeds = (0.2, 0.0, -0.1)  # far larger than the noise, but the same for every group
    levels = {"base": 0.50, "alike": 0.51, "better": 0.80}
    groups = {
        name: [level + seed + e for seed, e in zip(seeds, errors, strict=True)]
        for (name, level), errors in zip(levels.items(), noise, strict=True)
    }
    found = compare(groups, "base")
    assert found["spread"] == pytest.approx(math.sqrt(6 * 0.01**2 / 4))  # 4 degrees of freedom
    # t at 1 − 0.025/2 with 4 degrees of freedom is 3.495
    assert found["threshold"] == pytest.approx(3.495 * found["spread"] * math.sqrt(2 / 3), rel=1e-3)
    assert found["differences"]["alike"] < found["threshold"] < found["differences"]["better"]
    assert compare(groups, "base", resolution=0.4)["threshold"] == 0.4
    assert compare({"base": [0.5], "other": [0.6]}, "base")["threshold"] is None
    assert resolution_of_accuracy(0.5, 500) == pytest.approx(0.062, abs=1e-4)


def test_forwards_to_an_accuracy_are_interpolated():
    curve = [(0, 0.4), (100, 0.5), (200, 0.7)]
    assert e6_report.forwards_to(curve, 0.6) == 150
    assert e6_report.forwards_to(curve, 0.8) is None
    assert e6_report.forwards_to(curve, None) is None


def test_usable_step_sizes_take_off_nearly_as_much_loss_as_the_best():
    def line(lr: float, loss: float | None) -> dict[str, Any]:
        return {"lr": lr, "dev_loss": loss, "curve": [{"loss": 2.0}]}

    assert e7_report.usable([line(1, 1.5), line(3, 1.05), line(10, 1.0), line(30, None)]) == [3, 10]


def test_a_variant_may_name_hyper_parameters():
    assert variant("conmezo(beta=0.9, theta=1.2)").hyper == {"beta": 0.9, "theta": 1.2}
    assert rule_of("conmezo", 40).hyper["warmup"] == 40
    assert rule_of("conmezo(warmup=False)", 40).hyper["warmup"] is False
    with pytest.raises(ZOError, match="conmezo"):
        variant("conmezo(0.9)")


# --- the committed results ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, Any]]:
    return docs.read_committed()


def test_e6_is_committed_with_three_seeds_at_equal_forwards(committed):
    result = committed["E6"]
    assert not result["settings"]["quick"] and result["missing"] == []
    assert {"trec", "banking77"} <= result["tasks"].keys()
    assert result["tasks"]["trec"]["rules"].keys() == set(e6_run.RULES)
    for task, facts in result["tasks"].items():
        assert facts["rules"].keys() | facts["unfinished"] == set(e6_run.RULES), task
        lines = [line for found in facts["rules"].values() for line in (*found["grid"], *found["seeds"])]
        assert {line["forwards"] for line in lines} == {2 * facts["steps"]}
        for rule, found in facts["rules"].items():
            assert [line["seed"] for line in found["seeds"]] == [0, 1, 2], rule
            finite = [line for line in found["grid"] if line["dev_loss"] is not None]
            assert found["seeds"][0] == min(finite, key=lambda line: line["dev_loss"]), rule


def test_the_verdicts_follow_the_numbers(committed):
    """The committed comparison is that of the committed runs, and a rule that were far better would be named."""
    facts = committed["E6"]["tasks"]["trec"]
    assert e6_run.comparisons(facts) == committed["E6"]["comparison"]["trec"]
    doctored = copy.deepcopy(committed["E6"])
    for line in doctored["tasks"]["trec"]["rules"]["meazo"]["seeds"]:
        line["test_accuracy"] += 0.3
    doctored["comparison"]["trec"] = e6_run.comparisons(doctored["tasks"]["trec"])
    assert "Test accuracy" in e6.report(doctored) and "better than zo_sgd: `meazo`" in e6.report(doctored)


def test_e7_is_committed_and_v_is_noise(committed):
    result = committed["E7"]
    assert not result["settings"]["quick"]
    assert result["directions"]["runs"].keys() == e7_run.DIRECTIONS.keys()
    assert all(look["v"] == pytest.approx(look["noise"], rel=0.05) for look in result["second_moment"])
