"""The Trainer's calls of the writer, and how a request to stop ends the loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.support.tiny_run import trainer_in
from zowrap.loss.evaluation import Evaluation
from zowrap.model.descent import Descent
from zowrap.training.callback import WriterCallback
from zowrap.training.config import ZOConfig
from zowrap.training.run_folder import Run
from zowrap.training.signals import Interrupted


class Recorder:
    """Stands in for the writer: notes the evaluations it is given."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.zm = SimpleNamespace(descent=Descent(0))
        self.evaluations: list[tuple[Any, ...]] = []

    def add_evaluation(self, *evaluation: Any) -> None:
        self.evaluations.append(evaluation)


@pytest.fixture
def callback(tmp_path: Path) -> WriterCallback:
    """In a training whose epochs have five steps; ``evaluation`` is the latest one."""
    made = WriterCallback(lambda: made.evaluation)
    made.evaluation = (Evaluation(), "eval")
    run = Run(tmp_path)
    run.write_config("toy", {})
    made.writer = Recorder(run)  # type: ignore[assignment]
    state = TrainerState(max_steps=20)
    made.on_train_begin(config(), state, TrainerControl(), train_dataloader=range(5))
    return made


def config(**options: Any) -> ZOConfig:
    return ZOConfig(output_dir="x", report_to="none", **options)


@pytest.mark.slow
def test_the_writers_turn_is_between_the_callbacks_of_the_trainer_and_those_added_later(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen: list[str] = []

    class Notes(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(self.name)
            assert model is not None

    trainer = trainer_in(tmp_path, callbacks=[Notes("given")], max_steps=1)
    trainer.add_callback(Notes("added"))
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    assert WriterCallback not in kinds
    inner = trainer._callback.on_step_end
    trainer._callback.on_step_end = lambda *a, **k: seen.append("writer") or inner(*a, **k)  # type: ignore[method-assign]
    trainer.train()
    assert seen == ["given", "writer", "added"]
    trainer.callback_handler.callbacks.clear()  # the run's files are written all the same
    trainer.args.overwrite, trainer.args.max_steps = True, 2
    trainer.train()
    assert trainer.run.status()["state"] == "finished"


def test_a_training_that_begins_is_running(callback: WriterCallback) -> None:
    status = callback.writer.run.status()
    assert (status["state"], status["step"], status["max_steps"]) == ("running", 0, 20)


def test_every_epoch_has_its_own_random_numbers(callback: WriterCallback) -> None:
    def draw(step: int) -> float:
        callback.on_epoch_begin(config(), TrainerState(global_step=step), TrainerControl())
        return float(torch.rand(()))

    assert draw(0) == draw(0) == draw(4) != draw(5) == draw(9)


@pytest.mark.parametrize(
    ("strategy", "step", "saves"), [("steps", 7, True), ("steps", 10, True), ("epoch", 7, True), ("epoch", 10, False)]
)
def test_a_signal_ends_the_loop_with_a_checkpoint(
    callback: WriterCallback, strategy: str, step: int, saves: bool
) -> None:
    """At the end of an epoch that saves anyway, its evaluation comes first."""
    args, state = config(save_strategy=strategy), TrainerState(global_step=step, max_steps=20)
    control = callback.control = TrainerControl()
    callback.on_step_end(args, state, control)
    assert not control.should_training_stop
    callback.signal.stopped = True
    callback.on_step_end(args, state, control)
    assert control.should_training_stop and control.should_save == saves
    control.should_evaluate = control.should_save = True
    callback.on_epoch_end(args, state, control)
    assert control.should_evaluate == control.should_save == (step % 5 == 0)


def test_a_signal_after_the_last_step_ends_nothing(callback: WriterCallback) -> None:
    control = TrainerControl()
    callback.signal.stopped = True
    callback.on_step_end(config(), TrainerState(global_step=20, max_steps=20), control)
    assert not control.should_training_stop and not control.should_save


def test_a_signal_breaks_off_an_evaluation_of_the_training_alone(callback: WriterCallback) -> None:
    state = TrainerState()
    callback.on_prediction_step(config(), state, TrainerControl())
    callback.signal.stopped = True
    with pytest.raises(Interrupted):
        callback.on_prediction_step(config(), state, TrainerControl())
    callback.evaluation = None
    callback.on_prediction_step(config(), state, TrainerControl())


def test_evaluations_of_the_training_alone_are_kept(callback: WriterCallback) -> None:
    state, metrics = TrainerState(global_step=3), {"eval_loss": 1.0}
    sums, prefix = callback.evaluation
    callback.on_evaluate(config(), state, TrainerControl(), metrics=metrics)
    callback.on_evaluate(config(), state, TrainerControl(), metrics={})
    callback.evaluation = None
    callback.on_evaluate(config(), state, TrainerControl(), metrics=metrics)
    assert callback.writer.evaluations == [(metrics, 3, sums, prefix)]


def test_an_epoch_of_unknown_length_never_ends_early(callback: WriterCallback) -> None:
    endless = SimpleNamespace()
    callback.on_train_begin(config(), TrainerState(max_steps=20), TrainerControl(), train_dataloader=endless)
    callback.signal.stopped = True
    control = TrainerControl()
    callback.on_step_end(config(save_strategy="epoch"), TrainerState(global_step=10, max_steps=20), control)
    assert control.should_training_stop and control.should_save
    callback.on_epoch_end(config(), TrainerState(global_step=7), control)
    assert control.should_save
