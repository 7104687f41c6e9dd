"""The comparison of forwards: what a step costs, what a search chooses, and what the page says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import zowrap
from benchmarks.forwards import report, runs, search
from benchmarks.forwards.methods import METHODS, Backpropagation, ForwardOnly
from benchmarks.forwards.report import point_at, write
from benchmarks.forwards.runs import Run
from benchmarks.forwards.search import OutOfTime, Search, final_loss, finished
from tests.support.families import batch, make


def line_of(run: Run, losses: tuple[float | None, ...] = (2.0, 1.0)) -> dict[str, Any]:
    curve = [{"forwards": 0.0, "seconds": 0.0, "loss": 3.0, "accuracy": 0.5}]
    at = [run.forwards * (i + 1) / len(losses) for i in range(len(losses))]
    curve += [{"forwards": f, "seconds": f, "loss": loss, "accuracy": 0.6} for f, loss in zip(at, losses, strict=True)]
    chosen = 1e-4 if run.lr is None else run.lr
    return {**vars(run), "curve": curve, "chosen_lr": chosen, "test": {"loss": 1.0, "accuracy": 0.6}}


class Table:
    """A bench without a model: the loss at the end is a parabola of log η, with its minimum at ``best``."""

    def __init__(self, best: float) -> None:
        self.best, self.made = best, 0

    def make(self, run: Run) -> dict[str, Any]:
        self.made += 1
        lr = self.best if run.lr is None else run.lr
        distance = abs(torch.tensor(lr / self.best).log10().item())
        return line_of(run, (2.0, 1.0 + distance + 0.1 * (run.batch_size == 16) + 0.01 * run.seed))


def test_a_search_grows_its_grid_and_keeps_the_better_batch(tmp_path: Path) -> None:
    file, bench = finished(tmp_path / "runs.jsonl"), Table(best=1e-3)
    made = Search("minilm-trec", file, lambda: bench, float("inf"), lambda line: None)  # type: ignore[arg-type, return-value]
    made.make(["MeZO"])
    best = made.best("MeZO", made.line)
    assert best.lr == 1e-3 and best.batch_size == 4
    again = Search("minilm-trec", finished(file.path), lambda: pytest.fail("nothing is missing"), 0.0)
    assert again.best("MeZO", again.line) == best
    assert {line["seed"] for line in file.lines.values() if line["lr"] == best.lr and line["batch_size"] == 4} == {
        0,
        1,
        2,
    }


def test_a_search_stops_when_its_time_is_over(tmp_path: Path) -> None:
    made = Search("minilm-trec", finished(tmp_path / "runs.jsonl"), lambda: pytest.fail("too late"), until=0.0)
    with pytest.raises(OutOfTime):
        made.make(["MEAZO"])


def test_a_run_that_diverged_is_never_the_best() -> None:
    run = Run("minilm-trec", "MeZO", 1.0, 16, 0, 400)
    whole, broken = line_of(run), line_of(run, (0.1, None))
    short = {**line_of(run), "curve": line_of(replace(run, forwards=100))["curve"]}
    assert final_loss(whole) == 1.0 and final_loss(broken) == final_loss(short) == float("inf")
    reached = point_at(whole, 2.0)
    assert reached is not None and reached["forwards"] == 200 and point_at(whole, 0.5) is None


def test_the_page_tells_what_was_run_and_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    file = finished(tmp_path / "runs.jsonl")
    Search("stories-rte", file, lambda: Table(1e-4), float("inf"), lambda line: None).make(["MeZO", "residual"])  # type: ignore[arg-type, return-value]
    write(file)
    page = (tmp_path / "forwards.md").read_text()
    assert "| MeZO | " in page and "| residual | " in page
    assert "Not run yet: MEAZO" in page and "## minilm-trec\n\nNot run yet." in page
    assert (tmp_path / "forwards" / "stories-rte.png").stat().st_size > 1000


def test_the_page_says_how_many_times_fewer_forwards_a_method_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        "MeZO": [line_of(Run("stories-rte", "MeZO", 1e-4, 4, seed, 400), (2.0, 1.5)) for seed in (0, 1)],
        "residual": [line_of(Run("stories-rte", "residual", 1e-4, 16, seed, 400), (1.5, 1.0)) for seed in (0, 1)],
        "GRZO": [line_of(Run("stories-rte", "GRZO", 1e-4, 16, seed, 400), (3.0, 2.5)) for seed in (0, 1)],
    }
    table = "\n".join(report._table(lines))
    assert "Forwards of MeZO for each of these methods' to its last dev loss: residual 2 to 2." in table
    assert "| never |" in table and "forwards to MeZO's last loss, 1.500" in table


def test_the_rate_of_residual_credit_falls_within_the_budget_and_checks_cost() -> None:
    given = batch("opt", 16, 9)
    zm = zowrap.zo_wrap(make("opt"), "meazo", estimator="residual", engine="eager", lr=1e-6)
    stepper, rates = ForwardOnly(zm, 1e-4, iter([]), 12), []
    while stepper.forwards < 12:
        stepper.step(given)
        rates.append(zm.lr)
    cost = stepper._cost
    assert cost is not None and stepper.forwards == pytest.approx(cost * (len(rates) + zm.descent.evaluations))
    assert rates[0] == 1e-4 and rates == sorted(rates, reverse=True) and 0 <= rates[-1] < 4e-5


def test_what_a_step_costs() -> None:
    given = batch("opt", 4, 9)
    zm = zowrap.zo_wrap(make("opt"), "zo_sgd", engine="eager", lr=1e-6)
    stepper = ForwardOnly(zm, 1e-6, iter([]), None)
    stepper.step(given)
    assert stepper.forwards == pytest.approx(2 * 4 / 16)
    backward = Backpropagation(zm, [p.tensor for p in zm.parameters if p.tensor.ndim > 1], lr=0.5, depth=1.0)  # type: ignore[misc]
    before = float(zm.loss(**given))
    for _ in range(3):
        backward.step(given)
    assert backward.forwards == pytest.approx(3 * 3 * 4 / 16)
    assert float(zm.loss(**given)) < before - 0.1


def test_every_method_can_be_wrapped() -> None:
    for method in METHODS.values():
        if method.rule is not None:
            zowrap.zo_wrap(make("opt"), method.rule, engine="eager", **method.wrap)


@pytest.mark.slow
def test_a_run_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path(__file__).parents[2].parent / "shared"
    if not (shared / "models" / "stories260k").is_dir():
        pytest.skip("needs ../shared, with the story model and sentences")
    few = replace(runs.TASKS["stories-sst2"], dev_rows=16, test_rows=16)
    monkeypatch.setitem(runs.TASKS, "stories-sst2", few)
    monkeypatch.setattr(search, "SEEDS", (0,))
    bench = runs.Bench("stories-sst2", shared / "data", shared / "models", "eager")
    for name in METHODS:
        lr = None if not METHODS[name].lrs else METHODS[name].lrs[0]
        line = bench.make(Run("stories-sst2", name, lr, 16, 0, 12))
        json.dumps(line, allow_nan=False)
        assert line["curve"][0]["loss"] == bench.untuned["loss"] and line["curve"][-1]["forwards"] >= 12
        assert line["chosen_lr"] == lr or (lr is None and line["chosen_lr"] > 0)
