"""The folder of a run, and the facts in its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import zowrap
from tests.support.plain_run import loss_of
from zowrap.errors import ZOError
from zowrap.training.checkpoint import read_checkpoint_facts
from zowrap.training.run_folder import Run


def test_what_is_new_can_be_removed(tmp_path: Path) -> None:
    for name in ("kept/mine.txt", "kept/deep/also.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    run = Run(tmp_path)
    before = run.list_entries()
    for name in ("kept/new.txt", "new/deep/file.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("new")
    run.remove_all_but(before)
    assert run.list_entries() == before and (tmp_path / "kept" / "mine.txt").read_text() == "mine"


def test_a_new_state_drops_the_reason_of_a_failure(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_config("toy", {"rule": "meazo"})
    run.update_status(state="failed", reason="it broke", step=3)
    run.update_status(step=4)
    assert run.failure() == "it broke"
    run.update_status(state="running")
    assert run.failure() is None and run.status() == {"state": "running", "step": 4}
    assert run.config()["options"] == {"rule": "meazo"}


def test_the_untuned_models_evaluations_are_kept_by_set(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.before() == {}
    run.keep_before("eval", {"loss": 1.0})
    run.keep_before("test", {"loss": 2.0})
    assert run.before() == {"eval": {"loss": 1.0}, "test": {"loss": 2.0}}


def test_checkpoints_tell_the_plan_and_the_environment(tmp_path: Path) -> None:
    zm = zowrap.zo_wrap(nn.Linear(4, 1), loss_fn=loss_of, engine="eager")
    checkpoint = Run(tmp_path).save_checkpoint(0, zm, {}, plan={"steps": 3})
    assert read_checkpoint_facts(checkpoint, "plan") == {"steps": 3}
    assert read_checkpoint_facts(checkpoint, "environment")["device"] == "cpu"
    state = json.loads((checkpoint / "zo_state.json").read_text())
    (checkpoint / "zo_state.json").write_text(json.dumps({**state, "plan": None}))
    with pytest.raises(ZOError, match=r"zo_state\.json is damaged: its plan is missing"):
        read_checkpoint_facts(checkpoint, "plan")
    with pytest.raises(ZOError, match=r"Can.t find a valid checkpoint at .*: there is no zo_state\.json in it"):
        read_checkpoint_facts(tmp_path, "plan")
