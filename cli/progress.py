"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zowrap import telling
from zowrap.cli.console import say
from zowrap.cli.picture import read_metrics
from zowrap.numerics.intervals import wilson_interval

# Of an exponential mean over the logs, each the mean of a hundredth of the run: it follows a twentieth of the run.
SMOOTHING = 0.8


def started(report: Any) -> str:
    """Tell what the first step took before it could run, and how steps run from now on."""
    if report.engine != "compiled":
        return "steps run eagerly"
    code = f"compiled in {report.compile_seconds:.1f} s"
    if report.cached == report.compile_count:
        code = f"its code lay ready, loaded in {report.compile_seconds:.1f} s"
    text = f"the step was traced in {report.trace_seconds:.1f} s and {code}"
    if report.schedule == "sequential":
        text += f"; it evaluates one side of a direction at a time ({report.schedule_why})"
    return text


class Progress(TrainerCallback):
    """Shows smoothed loss, |projected gradient|, accuracy, step time and time left.

    Args:
        trainer: whose model is tuned; it may be wrapped again before the first step.
        rows: of the evaluation data, where the accuracy counts rows.
    """

    def __init__(self, trainer: Any, rows: int | None = None) -> None:
        self._trainer = trainer
        self.rows = rows
        self.facts: dict[str, float] = {}
        self.loss: float | None = None
        self.began = 0.0
        self.first = 0
        self.compiled = False
        self.said = -1.0
        self.bar: Any = None
        self.line: Any = None

    @property
    def zm(self) -> Any:
        return self._trainer.zm

    def on_choose_lr(self, done: int, most: int) -> None:
        """Before each evaluation that ``lr="auto"`` makes, ahead of the first step."""
        if not done:
            self._open("choosing the learning rate", most, 0)
            if self.bar is None:
                say(f"choosing the learning rate, with at most {most} evaluations of a training batch")
        if self.bar is not None:
            self.bar.update(self.line, completed=done)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.time(), state.global_step
        self.compiled = False
        self.stop()
        self._open("starting", state.max_steps, state.global_step)
        for loss in _logged_losses(args, state):
            self._smooth(loss)

    def _open(self, what: str, total: int, completed: int) -> None:
        """A bar, on a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
            )
            self.bar.start()
            self.line = self.bar.add_task(what, total=total, completed=completed)
            telling.shown_by = functools.partial(self._wait, what)

    def _wait(self, what: str, text: str | None) -> None:
        """Show what is being compiled in the bar's own line; afterwards what stood there."""
        if self.bar is not None:
            self.bar.update(self.line, description=what if text is None else text)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.compiled:  # the first step's time is the compiler's
            self.began, self.first, self.compiled = time.time(), state.global_step, True
            say(started(self.zm.inspect()))
        if self.bar is not None:
            self.bar.update(self.line, completed=state.global_step, description=self._text(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._smooth(float(logs["loss"]))
        self.facts.update({k: float(v) for k, v in logs.items() if isinstance(v, int | float)})
        # Ten lines in a run are enough for a log file; an evaluation always says its result.
        due = state.global_step - self.said >= state.max_steps / 10
        if self.bar is None and "loss" in logs and due:
            self.said = state.global_step
            say(f"step {state.global_step}/{state.max_steps}  {self._text(state)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics = metrics or {}
        parts = [f"{name} {metrics[f'eval_{name}']:.4f}" for name in ("loss", "accuracy") if f"eval_{name}" in metrics]
        if self.rows and "eval_accuracy" in metrics:
            low, high = wilson_interval(metrics["eval_accuracy"] * self.rows, self.rows)
            parts[-1] += f" ± {(high - low) / 2:.4f}"
        text = f"step {state.global_step}/{state.max_steps}  evaluation: {', '.join(parts)}"
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            say(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        telling.shown_by = None
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _smooth(self, loss: float) -> None:
        if not math.isfinite(loss):  # every step of a window was skipped
            return
        self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss

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


def _logged_losses(args: Any, state: Any) -> list[float]:
    """The logs up to the step that a resumed run goes on from: the mean of each window's finite losses."""
    if not state.global_step:
        return []
    steps, _ = read_metrics(Path(args.output_dir) / "metrics.jsonl")
    every = max(1, int(state.logging_steps))
    windows: dict[int, list[float]] = {}
    for line in steps:
        window = (line["step"] - 1) // every
        if line.get("loss") is not None and (window + 1) * every <= state.global_step:
            windows.setdefault(window, []).append(line["loss"])
    return [sum(losses) / len(losses) for _, losses in sorted(windows.items())]


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
