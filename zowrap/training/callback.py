"""The Trainer's callback that writes the files of a run at the right moments of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import CallbackHandler

from zowrap.loss.evaluation import Evaluation
from zowrap.training.loop import acts_at_epoch_end, count_steps_per_epoch
from zowrap.training.messages import say
from zowrap.training.signals import Interrupted, StopSignal
from zowrap.training.writer import RunWriter


class WriterCallback(TrainerCallback):
    """Calls the writer of a run from the Trainer's loop, and ends the loop when the run is asked to stop.

    Args:
        get_evaluation: returns the sums of the latest evaluation and the prefix of its metrics' names; ``None`` outside
            of a training.

    Attributes:
        writer: the writer of the present training.
        signal: the request to stop it.
    """

    writer: RunWriter

    def __init__(self, get_evaluation: Callable[[], tuple[Evaluation, str] | None]) -> None:
        self.signal = StopSignal()
        self._get_evaluation = get_evaluation
        self._steps_per_epoch: int | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.writer.tell_best(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps_per_epoch = count_steps_per_epoch(args, kwargs["train_dataloader"])
        self.writer.run.update_status(state="running", step=state.global_step, max_steps=state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A sampler or collator that draws from the global generators then draws the same in a resumed epoch.
        epoch = state.global_step // self._steps_per_epoch if self._steps_per_epoch else 0
        set_seed((args.data_seed + 1_000_003 * epoch) % 2**32)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal.stopped and state.global_step < state.max_steps:
            control.should_training_stop = True
            # At the end of an epoch the evaluation and checkpoint of the epoch come first.
            if not (acts_at_epoch_end(args) and self._is_epoch_end(state)):
                control.should_save = True
        descent = self.writer.zm.descent
        found_now = descent.stalled and descent.is_due(state.global_step - 1)
        if found_now and state.global_step < state.max_steps:
            say(f"the run ends after step {state.global_step}, because its steps no longer descend")
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal.stopped and self._steps_per_epoch and not self._is_epoch_end(state):
            control.should_evaluate = control.should_save = False  # the loop left the epoch before its end

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.signal.stopped and self._get_evaluation() is not None:
            raise Interrupted

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        evaluation = self._get_evaluation()
        if evaluation is not None and metrics:
            self.writer.add_evaluation(metrics, state.global_step, *evaluation)

    def _is_epoch_end(self, state: Any) -> bool:
        """Whether the last step ended an epoch; False where the length of an epoch is unknown."""
        return self._steps_per_epoch is not None and state.global_step % self._steps_per_epoch == 0


class RunEvents(CallbackHandler):
    """Calls the writer's callback beside the user's, in whose list it is not: there is no run without it.

    Its turn comes after the callbacks that the trainer was made with, and before those that were added later; at the
    end of a training it comes first, and tells all others where the best model lies.

    Args:
        handler: the Trainer's own, which this one replaces.
        mine: the writer's callback.
    """

    def __init__(self, handler: CallbackHandler, mine: WriterCallback) -> None:
        vars(self).update(vars(handler))
        self._mine = mine
        self._first = {id(each) for each in handler.callbacks}

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        facts = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        places = [place for place, each in enumerate(self.callbacks, 1) if id(each) in self._first]
        turn = 0 if event == "on_train_end" else max(places, default=0)
        for callback in [*self.callbacks[:turn], self._mine, *self.callbacks[turn:]]:
            known = {name: getattr(self, name) for name in facts}
            control = getattr(callback, event)(args, state, control, **known, **kwargs) or control
        return control
