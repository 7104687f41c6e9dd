"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback

from .console import say

# Of an exponential mean over the logs, each the mean of a hundredth of the run: it follows a twentieth of the run.
SMOOTHING = 0.8


class Progress(TrainerCallback):
    """Shows smoothed loss, |projected gradient|, accuracy, step time and time left."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}
        self.loss: float | None = None
        self.began = 0.0
        self.first = 0
        self.compiled = False
        self.said = -1.0
        self.bar: Any = None
        self.line: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.time(), state.global_step
        self.compiled = False
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
            )
            self.bar.start()
            self.line = self.bar.add_task("compiling", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.compiled:  # the first step's time is the compiler's
            self.began, self.first, self.compiled = time.time(), state.global_step, True
        if self.bar is not None:
            self.bar.update(self.line, completed=state.global_step, description=self._text(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            loss = float(logs["loss"])
            self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.facts.update({k: float(v) for k, v in logs.items() if isinstance(v, int | float)})
        # Ten lines in a run are enough for a log file; an evaluation always says its result.
        due = state.global_step - self.said >= state.max_steps / 10
        if self.bar is None and "loss" in logs and due:
            self.said = state.global_step
            say(f"step {state.global_step}/{state.max_steps}  {self._text(state)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics = metrics or {}
        parts = [f"{name} {metrics[f'eval_{name}']:.4f}" for name in ("loss", "accuracy") if f"eval_{name}" in metrics]
        text = f"step {state.global_step}/{state.max_steps}  evaluation: {', '.join(parts)}"
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            say(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _text(self, state: Any) -> str:
        done = state.global_step - self.first
        each = (time.time() - self.began) / max(done, 1)
        parts = [] if self.loss is None else [f"smoothed loss {self.loss:.4f}"]
        projected_grad = self.facts.get("projected_grad")
        if projected_grad is not None:
            parts.append(f"|g| {abs(projected_grad):.3g}")
        if "eval_accuracy" in self.facts:
            parts.append(f"last accuracy {self.facts['eval_accuracy']:.3f}")
        if done:
            parts += [f"{each:.2f} s/step", f"{_time(each * (state.max_steps - state.global_step))} left"]
        return "  ".join(parts)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
