"""The writer of a run's files, without a Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support.plain_run import PlainRun
from tests.support.tiny_run import weights_of
from zowrap.errors import ZOError, ZOWarning
from zowrap.training import writer as writer_module


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps_in(run: PlainRun) -> list[int]:
    """The steps that metrics.jsonl has a line of."""
    return [line["step"] for line in lines_of(run.run.metrics.path) if "projected_grad" in line]


# --- a start --------------------------------------------------------------------------------------------------------


def test_a_start_writes_configuration_and_header(tmp_path: Path) -> None:
    run = PlainRun(tmp_path / "run", base_model="some/base")
    config = run.run.config()
    assert (config["model"], config["options"], config["task"]) == ("some/base", {"rule": "meazo"}, {})
    (header,) = lines_of(run.run.journal_file)
    assert header["model"] == "some/base" and header["plan"] == {"steps": 8} and "engine" not in header["environment"]


def test_a_failed_start_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    run = PlainRun(tmp_path)
    run.evaluate(1.0)  # the untuned model is the best one so far
    with pytest.raises(ZOError, match="not finite from the start"):
        run.make_steps(1, broken={1})
    assert run.writer.start_failed
    run.writer.abandon()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "notes"]


def test_a_run_that_is_abandoned_later_keeps_its_files(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.writer.flush_steps = 50
    run.make_steps(3)
    assert run.run.recorded_steps() == 1  # the others wait
    run.writer.abandon()
    assert run.run.recorded_steps() == 3 and steps_in(run) == [1, 2, 3]


def test_a_label_that_names_no_class_is_the_first_error(tmp_path: Path) -> None:
    def refuse() -> None:
        raise ZOError("label 7 names no class")

    with pytest.raises(ZOError, match="label 7"):
        PlainRun(tmp_path, check_labels=refuse).make_steps(1, broken={1})


# --- steps ----------------------------------------------------------------------------------------------------------


def test_each_step_is_written_at_once_on_a_cpu(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    for step in range(1, 4):
        run.make_steps(1)
        assert run.run.recorded_steps() == step and steps_in(run)[-1] == step
    header = lines_of(run.run.journal_file)[0]
    assert header["environment"]["engine"] == "eager" and header["environment"]["memory"]


def test_waiting_steps_are_written_after_so_many_steps_or_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PlainRun(tmp_path)
    run.writer.flush_steps = 3
    run.make_steps(3)
    assert run.run.recorded_steps() == 1
    run.make_steps(1)
    assert run.run.recorded_steps() == 4
    monkeypatch.setattr(writer_module, "FLUSH_SECONDS", 0.0)
    run.make_steps(1)
    assert run.run.recorded_steps() == 5


def test_the_log_is_complete_whatever_still_waits(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.writer.flush_steps = 50
    run.make_steps(4)
    log = run.writer.take_log()
    losses = [record["loss"] for record in lines_of(run.run.journal_file)[1:]]
    assert len(losses) == 4 and log["loss"] == sum(losses) / 4


def test_the_first_skipped_step_is_warned_of_and_too_many_end_the_run(tmp_path: Path) -> None:
    run = PlainRun(tmp_path, max_skipped=3)
    with pytest.warns(ZOWarning, match="step 2 was skipped") as warned:
        run.make_steps(3, broken={2, 3})
    assert len(warned) == 1 and run.writer.log.skipped == 2
    with pytest.raises(ZOError, match=r"the run failed: 3 steps in a row .*max_skipped=3.* up to step 4"):
        run.make_steps(1, broken={4})
    assert run.run.status()["state"] == "failed" and "3 steps in a row" in str(run.run.failure())
    assert run.run.recorded_steps() == 4


# --- evaluations and checkpoints ------------------------------------------------------------------------------------


def test_the_best_model_lies_in_the_root(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.evaluate(2.0)
    run.make_steps(1)
    run.evaluate(1.0, runtime=3.0, samples_per_second=4.0)
    best = {name: tensor.clone() for name, tensor in weights_of(tmp_path).items()}
    run.make_steps(1)
    run.evaluate(1.5)
    run.writer.close(interrupted=False)
    assert {name: tensor.tolist() for name, tensor in weights_of(tmp_path).items()} == {
        name: tensor.tolist() for name, tensor in best.items()
    }
    status = run.run.status()
    assert (status["state"], status["best_step"], status["best_metric"], status["metric"]) == (
        "finished", 1, 1.0, "eval_loss",
    )  # fmt: skip
    lines = [line for line in lines_of(run.run.metrics.path) if "eval_loss" in line]
    assert [line["eval_loss"] for line in lines] == [2.0, 1.0, 1.5]
    assert not any("runtime" in name or "per_second" in name for line in lines for name in line)


def test_the_headers_of_weight_files_name_the_base_model(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(2)
    run.writer.close(interrupted=False)  # no evaluation chose a model: it is the last one
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata().items() >= {"base_model": "toy", "steps": "2"}.items()
        assert file.get_tensor("weight").equal(run.model.weight)


def test_each_row_is_compared_with_the_untuned_model(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.evaluate([1.0, 2.0, 3.0], prefix="eval_dev")
    run.make_steps(1)
    run.evaluate([0.5, 2.0, 4.0], prefix="eval_dev")
    rows = lines_of(run.run.metrics.path)[-1]["eval_dev_rows"]["loss"]
    assert (rows["rows"], rows["better"], rows["worse"]) == (3, 1, 1)
    assert run.run.before()["eval_dev"]["rows"]["loss"]["sums"] == [1.0, 2.0, 3.0]


def test_evaluation_data_without_a_loss_is_refused_by_row(tmp_path: Path) -> None:
    run = PlainRun(tmp_path / "run")
    with pytest.raises(ZOError, match=r"gives a loss that is not finite, first in row 1 of the evaluation data"):
        run.evaluate([1.0, math.nan, math.inf])
    run.writer.abandon()
    assert list((tmp_path / "run").iterdir()) == []


def test_checkpoints_hold_plan_and_state_and_the_oldest_go(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.writer.add_to_plan(learning_rate=0.5)
    for _ in range(2):
        run.make_steps(2)
        run.save()
    assert run.run.checkpoints() == [4] and run.run.status()["step"] == 4
    state = json.loads((run.run.checkpoint(4) / "zo_state.json").read_text())
    assert state["plan"] == {"steps": 8, "learning_rate": 0.5} == run.run.status()["plan"]
    assert json.loads((run.run.checkpoint(4) / "trainer_state.json").read_text())["global_step"] == 4


def test_the_plan_joins_the_header_before_the_first_step_alone(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.writer.add_to_plan(learning_rate=0.5)
    assert lines_of(run.run.journal_file)[0]["plan"] == {"steps": 8, "learning_rate": 0.5}
    run.make_steps(1)
    run.writer.add_to_plan(learning_rate=0.25)
    header, *records = lines_of(run.run.journal_file)
    assert header["plan"]["learning_rate"] == 0.5 and len(records) == 1
    assert run.run.status()["plan"]["learning_rate"] == 0.25


# --- the end --------------------------------------------------------------------------------------------------------


def break_weights(run: PlainRun) -> None:
    with torch.no_grad():
        run.zm.parameters[0].tensor.view(-1)[0] = math.nan


def test_weights_that_broke_are_never_written(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.evaluate(1.0)
    run.make_steps(2)
    run.save()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    break_weights(run)
    message = r"after step 2 the weights are not finite \(weight\).*the model of step 0 is kept"
    for write in (run.save, lambda: run.evaluate(0.5), lambda: run.writer.close(interrupted=False)):
        with pytest.raises(ZOError, match=message):
            write()
        assert run.run.status()["state"] == "failed"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == kept


@pytest.mark.filterwarnings("ignore:step .* was skipped")
def test_an_interrupted_run_need_not_end_well(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.evaluate(1.0)
    run.make_steps(6, broken={6})
    run.writer.close(interrupted=True)
    assert run.run.status()["state"] == "interrupted" and run.run.status()["step"] == 6


@pytest.mark.parametrize(("steps", "broken", "told"), [(2, {2}, "the last step was"), (8, {4, 5, 6, 7, 8}, "all")])
@pytest.mark.filterwarnings("ignore:step .* was skipped")
def test_a_run_whose_last_steps_were_skipped_has_failed(
    tmp_path: Path, steps: int, broken: set[int], told: str
) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(steps, broken)
    with pytest.raises(ZOError, match=f"{told}.* skipped, up to step {steps}: a loss was not finite"):
        run.writer.close(interrupted=False)


@pytest.mark.filterwarnings("ignore:step .* was skipped")
def test_a_few_skipped_steps_at_the_end_are_no_failure(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(8, {5, 6, 7, 8})
    run.writer.close(interrupted=False)
    assert run.run.status()["state"] == "finished"


def test_the_last_evaluation_of_each_set_must_have_a_loss(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(1)
    run.evaluate(math.nan, prefix="eval_dev")
    run.evaluate(1.0, prefix="eval_test")
    run.make_steps(1)
    run.evaluate(1.0, prefix="eval_test")
    with pytest.raises(ZOError, match="the evaluation at step 1 gave a dev_loss that is not finite"):
        run.writer.close(interrupted=False)
    run.evaluate(2.0, prefix="eval_dev")
    run.writer.close(interrupted=False)
    assert run.run.status()["state"] == "finished"


# --- a resumed run --------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_best_model_and_the_counts_of_the_whole(tmp_path: Path) -> None:
    run = PlainRun(tmp_path, logging_steps=3)
    with pytest.warns(ZOWarning, match="step 3 was skipped"):
        run.make_steps(4, broken={3})
    run.evaluate(1.0)
    run.save()
    run.make_steps(1)
    run.writer.abandon()
    again = PlainRun(tmp_path, resume=True, logging_steps=3)
    assert again.start.step == 5 and (again.writer.best.step, again.writer.best.value) == (4, 1.0)
    assert again.writer.log.skipped == 1
    losses = [record["loss"] for record in lines_of(run.run.journal_file)[1:]]
    finite = [losses[0], losses[1], losses[3], losses[4]]
    assert again.writer.log.mean_loss() == sum(finite) / 4
    assert again.writer.take_log()["loss"] == sum(losses[3:]) / 2  # the Trainer has logged the first three


def test_metrics_end_where_the_run_goes_on_and_a_torn_end_is_mended(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(3)
    run.writer.abandon()
    lines = run.run.metrics.path.read_text().splitlines(keepends=True)
    # Step 3 has no line any more, and there are an evaluation and a step of after the kill.
    later = [json.dumps({"step": 4, "eval_loss": 1.0}), json.dumps({**json.loads(lines[2]), "step": 4})]
    run.run.metrics.path.write_text("".join(lines[:2]) + "\n".join(later) + "\n")
    again = PlainRun(tmp_path, resume=True)
    assert again.start.step == 3 and again.writer.best.step is None
    found = lines_of(run.run.metrics.path)
    assert [line["step"] for line in found] == [1, 2, 3] and found[2]["seconds"] is None
    assert {**found[2], "seconds": 0} == {**json.loads(lines[2]), "seconds": 0}


def test_another_schedule_than_the_runs_is_told_after_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(1)
    run.writer.abandon()
    text = run.run.journal_file.read_text()
    run.run.journal_file.write_text(text.replace('"engine": "eager"', '"engine": "compiled"'))
    again = PlainRun(tmp_path, resume=True)
    assert "engine" not in capsys.readouterr().err
    again.make_steps(2)
    told = "the run began with engine compiled, now it is eager: later steps may differ in last bits"
    assert capsys.readouterr().err.count(told) == 1
