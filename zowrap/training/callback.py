"""The Trainer's callback that writes a run's files at the right moments of its loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, set_seed

from zowrap.training.resume import by_epoch, steps_per_epoch
from zowrap.training.writer import Interrupted, Keeper


class KeeperCallback(TrainerCallback):
    """Calls the keeper from the Trainer's loop."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._steps_per_epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps_per_epoch = steps_per_epoch(args, kwargs["train_dataloader"])
        self.keeper.trainer.run.update_status(state="running", step=state.global_step, max_steps=state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A sampler or collator that draws from the global generators then draws the same in a resumed epoch.
        epoch = state.global_step // self._steps_per_epoch if self._steps_per_epoch else 0
        set_seed((args.data_seed + 1_000_003 * epoch) % 2**32)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper.signal.stopped and state.global_step < state.max_steps:
            control.should_training_stop = True
            # At the end of an epoch the evaluation and checkpoint of the epoch come first.
            if not (by_epoch(args) and self._steps_per_epoch and state.global_step % self._steps_per_epoch == 0):
                control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper.signal.stopped and self._steps_per_epoch and state.global_step % self._steps_per_epoch:
            control.should_evaluate = control.should_save = False  # the epoch is not at its end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.keeper.signal.stopped and self.keeper.trainer.is_in_train:
            raise Interrupted

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.keeper.trainer.is_in_train and metrics:
            trainer = self.keeper.trainer
            self.keeper.evaluated(metrics, state.global_step, *trainer.last_evaluation)
