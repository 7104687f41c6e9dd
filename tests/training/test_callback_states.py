"""Callbacks get back the states that they had, each its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from tests.support.crash import CrashAfter
from tests.support.slow import slow_except
from tests.support.tiny_run import trainer_in
from zowrap.training.callback_states import collect_states, restore_states


class Counts(TrainerCallback, ExportableState):
    def __init__(self, name: str = "nobody", seen: int = 0) -> None:
        self.name, self.seen = name, seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1 if self.name == "first" else 10

    def state(self) -> dict[str, Any]:
        return {"args": {"name": self.name}, "attributes": {"seen": self.seen}}


class Stateless(TrainerCallback):
    pass


def test_two_of_one_class_keep_their_order_and_their_states() -> None:
    states = collect_states([Counts("first", 3), Stateless(), Counts("second", 5), EarlyStoppingCallback(2)])
    assert list(states) == ["Counts", "EarlyStoppingCallback"] and len(states["Counts"]) == 2
    states = json.loads(json.dumps(states))
    one, two, stopping = Counts(), Counts(), EarlyStoppingCallback(7)
    assert restore_states([one, Stateless(), two, stopping], states, arguments=False) == []
    assert (one.seen, two.seen, one.name) == (3, 5, "nobody") and stopping.early_stopping_patience == 7
    assert restore_states([one, two, stopping], states, arguments=True) == []
    assert (one.name, two.name, stopping.early_stopping_patience) == ("first", "second", 2)


def test_a_state_without_a_callback_is_named_and_one_without_a_state_stays() -> None:
    one, two, three = Counts(), Counts("b", 1), Counts("c", 2)
    assert restore_states([one], collect_states([two, three]), arguments=False) == ["Counts"]
    assert restore_states([one], collect_states([EarlyStoppingCallback()]), arguments=False) == [
        "EarlyStoppingCallback"
    ]
    assert restore_states([one, two, three], {"Counts": {"attributes": {"seen": 9}}}, arguments=False) == []
    assert (one.seen, two.seen, three.seen) == (9, 1, 2)


@pytest.mark.parametrize("saved", [None, 3, {"attributes": 3}, {"attributes": {"on_step_end": 1, "unknown": 2}}])
def test_a_file_sets_nothing_but_what_the_callback_calls_its_state(saved: Any) -> None:
    callback = Counts("mine", 4)
    restore_states([callback], {"Counts": saved}, arguments=True)
    assert vars(callback) == {"name": "mine", "seen": 4}


@pytest.mark.parametrize("step", slow_except([4], [2, 4, 5, 7]))
def test_a_resumed_run_counts_on_where_it_was(tmp_path: Any, step: int) -> None:
    options = {"max_steps": 8, "save_steps": 4, "eval_steps": 3, "logging_steps": 2}
    torch.manual_seed(0)
    mine = [Counts("first"), Counts("second")]
    whole = trainer_in(tmp_path / "a", callbacks=mine, **options)
    whole.train()
    assert [each.seen for each in mine] == [8, 80]
    with pytest.raises(RuntimeError):
        trainer_in(tmp_path / "b", callbacks=[Counts("first"), Counts("second"), CrashAfter(step)], **options).train()
    mine = [Counts("first"), Counts("second")]
    again = trainer_in(tmp_path / "b", callbacks=mine, **options)
    again.train(resume_from_checkpoint=True)
    assert [each.seen for each in mine] == [8, 80] and again.resumed_from > 0
    assert _without_times(again.state.log_history) == _without_times(whole.state.log_history)


def _without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("loss", "eval_loss", "projected_grad", "learning_rate", "epoch", "step", "total_flos")
    return [{name: value for name, value in entry.items() if name in kept} for entry in history[:-1]]


@pytest.mark.slow
def test_early_stopping_that_was_interrupted_stops_where_it_would_have(tmp_path: Any) -> None:
    options = {
        "max_steps": 20, "save_steps": 6, "eval_steps": 2, "learning_rate": 1e-6, "metric_for_best_model": "loss",
        "greater_is_better": False,
    }  # fmt: skip
    whole = trainer_in(tmp_path / "a", callbacks=[EarlyStoppingCallback(5, 1.0)], **options)
    stopped = whole.train().global_step
    assert 8 < stopped < 20
    for step in (3, 7, stopped - 1):
        folder = tmp_path / str(step)
        with pytest.raises(RuntimeError):
            trainer_in(folder, callbacks=[EarlyStoppingCallback(5, 1.0), CrashAfter(step)], **options).train()
        again = trainer_in(folder, callbacks=[EarlyStoppingCallback(5, 1.0)], **options)
        assert again.train(resume_from_checkpoint=True).global_step == stopped
        assert _without_times(again.state.log_history) == _without_times(whole.state.log_history)
