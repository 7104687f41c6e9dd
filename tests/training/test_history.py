"""What was logged, and the callbacks' states, between two checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from zowrap.training.history import History


def written(folder: Path) -> History:
    history, state = History(folder / "history.jsonl"), TrainerState()
    history.add_log({"eval_loss": 3.0, "step": 0}, 0)
    for step, patience, best in ((1, 0, 3.0), (2, 0, 3.0), (3, 1, 2.5)):
        state.global_step, state.best_metric, state.best_global_step = step, best, step
        history.add_log({"loss": math.nan if step == 2 else float(step), "epoch": step / 4, "step": step}, step)
        history.add_states({"Stopping": {"attributes": {"patience": patience}}}, state)
    history.close()
    return history


def state_at(history: History, after: int, until: int) -> TrainerState:
    state = TrainerState()
    history.apply(state, after=after, until=until)
    return state


def test_a_state_is_brought_from_one_step_to_another(tmp_path: Path) -> None:
    history = written(tmp_path)
    state = state_at(history, 0, 2)
    assert [entry["step"] for entry in state.log_history] == [0, 1, 2] and math.isnan(state.log_history[2]["loss"])
    assert (state.best_metric, state.epoch) == (3.0, 0.5)
    state = state_at(history, 2, 3)
    assert [entry["step"] for entry in state.log_history] == [3] and state.best_global_step == 3
    assert state.stateful_callbacks == {"Stopping": {"attributes": {"patience": 1}}}
    assert state_at(history, 3, 3).log_history == []


def test_states_are_written_only_where_they_changed(tmp_path: Path) -> None:
    history, state = History(tmp_path / "history.jsonl"), TrainerState()
    assert not history.has_states()
    for step, patience in enumerate((0, 0, 1, 1)):
        state.global_step = step
        history.add_states({"Stopping": {"attributes": {"patience": patience}}}, state)
    history.add_states({}, state)
    history.close()
    assert [line["step"] for _, _, line in history.read()] == [0, 2] and history.has_states()


def test_what_came_after_a_step_is_cut_off(tmp_path: Path) -> None:
    history = written(tmp_path)
    history.keep(1)
    assert [line["step"] for _, _, line in history.read()] == [0, 1, 1]


@pytest.mark.parametrize(
    "line", ["{broken", '"text"', '{"step": "2", "log": {}}', '{"step": 2, "log": 3, "states": 4}']
)
def test_a_damaged_line_is_no_reason_to_fail(tmp_path: Path, line: str, capsys: Any) -> None:
    history = written(tmp_path)
    lines = history.path.read_text().splitlines()
    history.path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")
    state = state_at(history, 0, 3)
    assert [entry["step"] for entry in state.log_history][:2] == [0, 1]
    history.keep(3)
    history.add_log({"step": 3}, 3)
    history.close()
    assert list(history.read())
