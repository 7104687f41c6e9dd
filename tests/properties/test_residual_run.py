"""A run with residual credit: its journal repeats no step, so a resume goes on from the last checkpoint, bitwise."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.properties.test_resume import assert_same_run, die_at, finish, in_child, metrics, train
from tests.support.slow import slow_except
from tests.support.tiny_run import tiny_llama, trainer_in
from zowrap.errors import ZOError
from zowrap.training.replay import replay_run

OPTIONS = {"estimator": "residual", "learning_rate": 1e-3, "save_steps": 5, "rule": "zo_adam"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert finish(in_child(lambda: train(folder, **OPTIONS))) == 0
    return folder


# Before the first checkpoint, between two writes of one, and well after it: operations on files, as die_at counts them.
@pytest.mark.parametrize("operation", slow_except((31,), (9, 31, 47)))
def test_killed_and_resumed_it_is_the_uninterrupted_run(whole: Path, tmp_path: Path, operation: int) -> None:
    def work() -> None:
        die_at(operation)
        train(tmp_path, **OPTIONS)

    assert finish(in_child(work)) == -signal.SIGKILL
    assert finish(in_child(lambda: train(tmp_path, resume=True, **OPTIONS))) == 0
    assert json.loads((tmp_path / "result.txt").read_text())["resumed_from"] in (0, 5, 10, 15, 20)
    assert_same_run(tmp_path, whole)


def test_its_rate_falls_unless_another_schedule_is_asked_for(tmp_path: Path) -> None:
    def schedule(**options: object) -> str:
        return str(getattr(trainer_in(tmp_path, **options).args.lr_scheduler_type, "value", None))

    assert schedule(estimator="residual") == "linear"
    assert schedule(estimator="residual", lr_scheduler_type="constant") == "constant"
    assert schedule(estimator="central") == "constant"


def test_the_loss_falls(whole: Path) -> None:
    losses = [line["eval_loss"] for line in metrics(whole) if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.02


def test_a_replay_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ZOError, match=r"is of a run with estimator 'residual': .* repeated with the data"):
        replay_run(tiny_llama(), whole, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_run_of_another_estimator_is_not_gone_on_with(whole: Path, tmp_path: Path) -> None:
    other = trainer_in(whole, **{**OPTIONS, "estimator": "central"})
    with pytest.raises(ZOError, match=r"written with direction='none .residual credit.'"):
        other.train(resume_from_checkpoint=True)
