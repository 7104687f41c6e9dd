"""What ``zowrap tune`` claims at its end: how sure the figures are, what was skipped, and when a run has failed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_tune import QUICK, assert_refused
from tests.conftest import Outcome, reviews, write_rows
from zowrap.cli.summary import dev_facts, lines, unseen_facts

Cli = Callable[..., Outcome]


def evaluation(step: int, accuracy: float, better: int = 0, worse: int = 0, loss: float = 1.0) -> dict[str, Any]:
    """A line of metrics.jsonl of 100 rows."""
    counts = {"rows": 100, "interval": [accuracy - 0.1, accuracy + 0.1], "better": better, "worse": worse}
    rows = {"accuracy": counts, "loss": {**counts, "interval": [loss - 0.1, loss + 0.1]}}
    return {"step": step, "eval_loss": loss, "eval_accuracy": accuracy, "eval_rows": rows}


def told(evaluations: list[dict[str, Any]], best: int, **more: Any) -> list[str]:
    facts = dev_facts(evaluations, best, "accuracy")
    final = next(e for e in evaluations if e["step"] == best)
    record = {"out": "RUN", "steps": 100, "best_step": best, "loss": final["eval_loss"]}
    return lines({**record, "accuracy": final["eval_accuracy"], **facts, **more})


# --- the words ----------------------------------------------------------------------------------------------------


def test_the_best_of_ten_noisy_evaluations_is_no_gain() -> None:
    noisy = [evaluation(0, 0.40), *(evaluation(10 * i, 0.41, 6, 5) for i in range(1, 11))]
    noisy[6] = evaluation(60, 0.49, 16, 7, 0.9)
    first, second = told(noisy, 60)
    assert first == (
        "RUN: 100 steps, loss 1.0000 → 0.9000 (95 %: 0.8000 to 1.0000), accuracy 0.4000 → 0.4900 "
        "(95 %: 0.3900 to 0.5900), best on dev at step 60, the best of 11 evaluations on 100 rows"
    )
    assert second.startswith("no improvement beyond noise in accuracy on dev")
    facts = dev_facts(noisy, 60, "accuracy")
    assert facts["improved"] is False and facts["evaluations"] == 11 and facts["dev_examples"] == 100
    assert facts["accuracy_interval"] == [0.39, 0.59]


def test_a_gain_is_one_only_with_the_number_of_evaluations_allowed_for() -> None:
    two = [evaluation(0, 0.40), evaluation(100, 0.50, 16, 6)]  # p = 0.05
    assert dev_facts(two, 100, "accuracy")["improved"] is False
    two[1] = evaluation(100, 0.53, 18, 5)
    assert dev_facts(two, 100, "accuracy")["improved"] is True
    many = [two[0], *(evaluation(i, 0.4) for i in range(1, 10)), two[1]]
    assert dev_facts(many, 100, "accuracy")["improved"] is False
    many[-1] = evaluation(100, 0.67, 33, 6)
    said = told(many, 100)
    assert said[1].startswith("accuracy on dev improved beyond noise")
    assert said[2] == "still improving at the last evaluation: more --steps may help"


def test_what_is_not_known_is_not_claimed() -> None:
    bare = [{"step": step, "eval_loss": 1.0, "eval_accuracy": 0.4 + step / 100} for step in (0, 10, 20)]
    facts = dev_facts(bare, 20, "accuracy")
    assert facts["improved"] is None and facts["accuracy_interval"] is None and facts["dev_examples"] is None
    assert dev_facts([], None, "loss")["improved"] is None
    assert lines({"out": "RUN", "steps": 3, "loss": 0.5}) == ["RUN: 3 steps, loss 0.5000"]  # of an earlier version
    kept = told([evaluation(0, 0.5), evaluation(50, 0.4, 1, 11)], 0)
    assert kept[1] == "no improvement: no evaluation was better than the untuned model's, which is kept"


def test_rows_that_chose_nothing_can_also_tell_of_a_loss() -> None:
    def verdict(before: float, after: float, better: int, worse: int) -> str:
        rows = {"accuracy": {"interval": [0.4, 0.5], "better": better, "worse": worse}}
        facts = unseen_facts({"accuracy": before}, {"accuracy": after, "examples": 200}, rows, "accuracy")
        (line,) = lines({"out": "RUN", "steps": 1, **facts})[1:]
        assert line.startswith(f"test, 200 rows that chose nothing: accuracy {before:.4f} → {after:.4f} (95 %: 0.4")
        return line.split(": ")[-1]

    assert verdict(0.52, 0.495, 10, 15) == "no improvement beyond noise"
    assert verdict(0.52, 0.64, 30, 6) == "improved beyond noise"
    assert verdict(0.52, 0.40, 6, 30) == "worse beyond noise"


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_test_data_is_measured_before_and_after_and_a_resumed_run_says_the_same(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap.cli import progress

    test = write_rows(tmp_path / "test.jsonl", reviews(30, seed=2))
    options = ("--task", "lm", "--data", data["train"], "--eval-data", data["test"], "--test-data", test, *QUICK)
    options = (*options, "--steps", 12, "--lr", "1e-2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    one = zowrap_cli("tune", models["causal"], *options, "--out", whole, "--json")
    assert one.code == 0, one.err
    record = one.json
    assert record["best_step"] > 0 and record["test_examples"] == 30 and record["metric"] == "loss"
    for model, suffix in ((models["causal"], "_before"), (whole, "")):
        measured = zowrap_cli("eval", model, "--task", "lm", "--data", test, "--json").json
        assert record[f"test_loss{suffix}"] == pytest.approx(measured["loss"], rel=1e-5)
        assert record[f"test_accuracy{suffix}"] == pytest.approx(measured["accuracy"])
    assert record["test_accuracy_interval"] == pytest.approx(measured["accuracy_interval"])
    assert record["test_loss_interval"][0] < record["test_loss"] < record["test_loss_interval"][1]
    assert record["test_improved"] in (True, False) and record["improved"] in (True, False)
    plain = zowrap_cli("tune", models["causal"], *options, "--out", tmp_path / "plain")
    assert f"loss {record['test_loss_before']:.4f} → {record['test_loss']:.4f} (95 %: " in plain.out
    assert "test, 30 rows that chose nothing: " in plain.out

    class Stop(progress.Progress):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        assert zowrap_cli("tune", models["causal"], *options, "--out", run).code == 1
    told = zowrap_cli("tune", "--resume", "--out", run, "--json")
    assert told.code == 0 and told.json["resumed_from"] > 0, told.err
    again = zowrap_cli("tune", "--resume", "--out", run, "--json")  # finished: told from what the run keeps
    own = {"out", "steps_run", "resumed_from", "seconds"}
    for other in (told.json, again.json):
        assert {k: v for k, v in other.items() if k not in own} == {k: v for k, v in record.items() if k not in own}
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((run / "zowrap.json").read_text())["options"]["test_data"] == str(test)


def test_test_data_that_cannot_be_used_is_refused_before_anything_is_trained(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    odd = write_rows(tmp_path / "odd.jsonl", [*reviews(3), {"text": "movie", "label": "odd"}])
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": "movie"}])
    command = ("tune", models["encoder"], "--data", data["train"], *QUICK, "--out", tmp_path / "run", "--test-data")
    assert_refused(zowrap_cli(*command, "nowhere.jsonl"), "no such file: nowhere.jsonl")
    assert_refused(zowrap_cli(*command, odd), "odd.jsonl line 4: label 'odd' is not one of the labels of training")
    assert_refused(zowrap_cli(*command, bare), "bare.jsonl line 1 has no column 'label'")
    assert not (tmp_path / "run").exists()


def test_the_evaluations_say_how_sure_they_are(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    from zowrap.numerics.intervals import wilson_interval

    command = ("tune", models["encoder"], "--data", data["train"], "--eval-data", data["test"], *QUICK)
    told = zowrap_cli(*command, "--out", tmp_path / "run", "--json")
    assert told.code == 0, told.err
    record = told.json
    assert record["accuracy_interval"] == pytest.approx(wilson_interval(record["accuracy"] * 10, 10))
    assert (record["dev_examples"], record["evaluations"], record["skipped_steps"]) == (10, 5, 0)
    low, high = wilson_interval(record["accuracy_before"] * 10, 10)
    assert f"accuracy {record['accuracy_before']:.4f} ± {(high - low) / 2:.4f}" in told.err
    assert record["test_accuracy"] is None and record["test_accuracy_before"] is None


def test_skipped_steps_are_told_at_the_end(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zowrap.model.zo_model import ZOModel

    accumulate = ZOModel.accumulate

    def broken(zm: ZOModel, **batch: Any) -> Any:
        loss = accumulate(zm, **batch)
        if zm.step_count in (2, 3):
            zm.accumulator.sums = zm.accumulator.sums * math.nan
        return loss

    monkeypatch.setattr(ZOModel, "accumulate", broken)
    command = ("tune", models["encoder"], "--data", data["train"], *QUICK, "--steps", 6, "--lr", "1e-3", "--out")
    told = zowrap_cli(*command, tmp_path / "run")
    assert told.code == 0, told.err
    assert told.err.splitlines().count("2 of 6 steps were skipped: their loss was not finite") == 1
    assert told.err.count("warning: step 3 was skipped") == 1 and "smoothed loss nan" not in told.err
    assert zowrap_cli(*command, tmp_path / "other", "--json").json["skipped_steps"] == 2
    again = zowrap_cli("tune", "--resume", "--out", tmp_path / "run", "--json")
    assert again.json["skipped_steps"] == 2


def test_a_run_that_ends_without_a_loss_has_failed_and_says_so_ever_after(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run, to = tmp_path / "run", tmp_path / "to"
    command = ("tune", models["causal"], "--task", "lm", "--data", data["train"], *QUICK, "--steps", 12)
    told = zowrap_cli(*command, "--weight-decay", "1e30", "--lr", "1e-2", "--out", run, "--json")
    assert_refused(told, "the run failed: after step", as_json=True)
    assert not list(run.rglob("*.safetensors")) and (run / "journal.jsonl").is_file()
    status = json.loads((run / "zowrap.json").read_text())["status"]
    assert status["state"] == "failed" and "the weights are not finite" in status["reason"]
    assert_refused(zowrap_cli("tune", "--resume", "--out", run), f"failed, and would fail again: {status['reason']}")
    for again in (("eval", run, "--data", data["train"]), ("export", run, "--to", to)):
        assert_refused(zowrap_cli(*again), f"holds no tuned model, because its run failed: {status['reason']}")
    assert not to.exists()


def test_the_best_model_of_a_run_that_failed_is_kept_and_told_of(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    run, to = tmp_path / "run", tmp_path / "to"
    command = ("tune", models["causal"], "--task", "lm", "--data", data["train"], "--eval-data", data["test"], *QUICK)
    told = zowrap_cli(*command, "--steps", 12, "--weight-decay", "1e30", "--lr", "1e-2", "--out", run)
    assert_refused(told, "the model of step 0 is kept")
    for again in (("eval", run, "--data", data["test"]), ("export", run, "--to", to)):
        told = zowrap_cli(*again)
        assert told.code == 0, told.err
        assert f"the run in {run} failed: " in told.err and "the best model from before, of step 0" in told.err
