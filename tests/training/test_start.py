"""Finding where a run goes on, without a Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.plain_run import PlainRun, make_batch
from zowrap.errors import ZOError
from zowrap.training.run_folder import Run


def train(folder: Path, steps: int, **options: Any) -> PlainRun:
    """Make steps, with a checkpoint after every second one, and break off."""
    run = PlainRun(folder, **options)
    for _ in range(steps):
        run.make_steps(1)
        if run.zm.step_count % 2 == 0:
            run.save()
    run.writer.abandon()
    return run


def weights(run: PlainRun) -> torch.Tensor:
    return run.model.weight.detach().clone()


def test_a_start_wraps_the_model_once_for_the_steps_planned(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    assert run.wrapped == [(8, None)] and run.start.step == 0 and run.start.plan == {"steps": 8}
    assert run.start.header["plan"] == {"steps": 8} and run.start.environment == {} and run.start.journal is None


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_run_goes_on_where_its_journal_ends(tmp_path: Path, steps: int) -> None:
    whole, cut = train(tmp_path / "whole", steps), train(tmp_path / "cut", steps)
    again = PlainRun(tmp_path / "cut", resume=True)
    assert again.start.step == again.zm.step_count == steps == again.start.state.global_step
    assert weights(again).equal(weights(whole))
    for run in (whole, again):
        run.zm.step(**make_batch(steps))
    assert weights(again).equal(weights(whole)) and not weights(again).equal(weights(cut))


def test_the_last_step_is_made_again_where_a_checkpoint_was_due(tmp_path: Path) -> None:
    run = PlainRun(tmp_path)
    run.make_steps(4)
    run.writer.abandon()
    again = PlainRun(tmp_path, resume=True)
    assert again.start.step == 3 and Run(tmp_path).recorded_steps() == 3


def test_a_longer_run_keeps_its_plan(tmp_path: Path) -> None:
    train(tmp_path, 3)
    again = PlainRun(tmp_path, resume=True, max_steps=20)
    assert again.wrapped == [(8, None)] and again.start.plan == {"steps": 8}


def test_the_plan_of_a_lost_journal_is_in_the_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 4)
    Run(tmp_path).journal_file.unlink()
    again = PlainRun(tmp_path, resume=True, max_steps=20)
    assert again.start.step == 4 and again.start.plan == {"steps": 8}


@pytest.mark.parametrize("of_one_checkpoint", [False, True])
def test_a_new_journal_of_a_run_under_way_names_the_environment_it_began_in(
    tmp_path: Path, of_one_checkpoint: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    train(tmp_path / "one", 4)
    folder = tmp_path / ("other" if of_one_checkpoint else "one")
    Run(tmp_path / "one").journal_file.unlink()
    try:
        torch.set_num_threads(threads + 1)
        again = PlainRun(folder, resume=str(Run(tmp_path / "one").checkpoint(4)) if of_one_checkpoint else True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert f"going on with {threads} threads, as the run began" in capsys.readouterr().err
    header = json.loads(again.run.journal_file.read_text().splitlines()[0])
    assert header["environment"] == again.start.environment and header["environment"]["threads"] == threads


def test_an_eager_run_is_wrapped_again_where_the_engine_is_left_open(tmp_path: Path) -> None:
    train(tmp_path, 3)
    again = PlainRun(tmp_path, resume=True, engine=None)
    assert again.wrapped == [(8, None), (8, "eager")]
    assert again.zm.step_count == 3  # the steps were replayed on the model wrapped last


def test_a_finished_run_has_nothing_left(tmp_path: Path) -> None:
    run = train(tmp_path, 8)
    run.run.update_status(state="finished")
    again = PlainRun(tmp_path, resume=True)
    assert again.start.finished and again.start.step == 8
    assert not PlainRun(tmp_path, resume=True, max_steps=9).start.finished


def test_going_back_to_a_checkpoint_drops_what_came_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 7, save_total_limit=0)
    again = PlainRun(tmp_path, resume=str(Run(tmp_path).checkpoint(4)))
    assert again.start.step == 4 and Run(tmp_path).checkpoints() == [2, 4] and Run(tmp_path).recorded_steps() == 4
    assert "going back to step 4" in capsys.readouterr().err


def test_the_path_of_the_run_itself_is_no_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 3)
    assert PlainRun(tmp_path, resume=str(tmp_path)).start.step == 3


@pytest.mark.parametrize("resume", [True, "begun", "checkpoint-2"])
def test_a_folder_without_a_run_has_nothing_to_go_on_from(
    tmp_path: Path, resume: bool | str, capsys: pytest.CaptureFixture[str]
) -> None:
    if resume is True:
        with pytest.raises(ZOError, match="No valid checkpoint found in output directory"):
            PlainRun(tmp_path, resume=True)
    elif resume == "begun":  # killed before its first step
        Run(tmp_path).write_config(None, {})
        assert PlainRun(tmp_path, resume=True).start.step == 0
        assert "nothing to go on from: starting from the first step" in capsys.readouterr().err
    else:
        with pytest.raises(ZOError, match=r"Can.t find a valid checkpoint at .*: there is no zo_state\.json in it"):
            PlainRun(tmp_path, resume=str(tmp_path / resume))


def test_a_run_is_replaced_only_with_leave(tmp_path: Path) -> None:
    train(tmp_path, 4)
    with pytest.raises(ZOError, match="already holds a run: go on with it"):
        PlainRun(tmp_path)
    train(tmp_path / "other", 4)
    with pytest.raises(ZOError, match="of another one cannot go on there"):
        PlainRun(tmp_path, resume=str(Run(tmp_path / "other").checkpoint(4)))
    assert Run(tmp_path).checkpoints() == [4]
    assert PlainRun(tmp_path, overwrite=True).start.step == 0
    assert Run(tmp_path).checkpoints() == [] and Run(tmp_path).recorded_steps() == 0


def test_a_model_that_has_moved_cannot_start_or_go_on(tmp_path: Path) -> None:
    class Moved(PlainRun):
        def wrap(self, steps: int, engine: str | None) -> Any:
            zm = super().wrap(steps, engine)
            for step in range(6):
                zm.step(**make_batch(step))
            return zm

    with pytest.raises(ZOError, match="the model has already moved 6 steps"):
        Moved(tmp_path)
    train(tmp_path, 5)
    shutil.rmtree(Run(tmp_path).checkpoint(4))
    with pytest.raises(ZOError, match="the model has moved past step 5"):
        Moved(tmp_path, resume=True)


def test_the_base_models_own_folder_is_no_place_for_a_run(tmp_path: Path) -> None:
    base = tmp_path / "run" / "base"
    base.mkdir(parents=True)
    with pytest.raises(ZOError, match="is the model's own folder"):
        PlainRun(base, base_model=str(base))
    with pytest.raises(ZOError, match="is the model's own folder"):
        PlainRun(tmp_path / "run", base_model=str(base), overwrite=True)
    assert PlainRun(tmp_path / "run", base_model=str(base)).start.header["model"] == str(base)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"seed": 1}, "seed=42, this run has 1"), ({"model": nn.Linear(4, 1, bias=False)}, "there bias moves")],
)
def test_another_run_is_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    train(tmp_path, 3)
    with pytest.raises(ZOError, match=f"is the journal of another run: .*{told}"):
        PlainRun(tmp_path, resume=True, **options)


def test_a_plateau_schedule_is_stepped_by_the_evaluations(tmp_path: Path) -> None:
    run = PlainRun(tmp_path, metric_for_best_model="loss")
    run.evaluate(4.0)
    for loss in (3.0, 2.0):
        run.make_steps(1)
        run.evaluate(loss)
    run.make_steps(1)
    run.writer.abandon()
    start = PlainRun(tmp_path, resume=True, metric_for_best_model="loss").start
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert start.scheduler_steps(plateau) == [(3.0,), (2.0,)]
    assert start.scheduler_steps(torch.optim.lr_scheduler.LinearLR(optimizer)) == [(), (), ()]
