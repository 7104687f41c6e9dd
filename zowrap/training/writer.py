"""What a training keeps: journal, metrics, checkpoints and the best model, each at the right moment of the loop."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers.trainer_callback import ExportableState

from zowrap.errors import ZOError, ZOWarning, not_finite
from zowrap.loss.evaluation import Evaluation, measure_certainty
from zowrap.model.zo_model import StepResult
from zowrap.step.finite import not_finite as elements_not_finite
from zowrap.storage.atomic import remove
from zowrap.storage.save import save_model, save_settings
from zowrap.training.journal import Journal, environment
from zowrap.training.resume import Start, say_differences
from zowrap.training.signals import StopSignal

if TYPE_CHECKING:
    from zowrap.training.trainer import ZOTrainer

# Reading a result waits for the device. On an accelerator results stay there and are read together, at most this many
# steps or seconds apart; on a CPU every record is written right after its step, so a kill loses that step at most.
FLUSH_STEPS, FLUSH_SECONDS = 50, 60.0
# A run whose last steps were all skipped ends without a loss: this many of them, or a hundredth of the run if more.
LAST_STEPS = 5
_HELPS = "a smaller lr or eps, or a model in float32, usually helps"
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class Interrupted(Exception):
    """Raised inside an evaluation when the run was asked to stop."""


class Keeper:
    """Writes a training's files.

    Attributes:
        base: ``{"base_model": name}`` where the name is known.
        plan: what was settled at the first start, see :class:`zowrap.training.resume.Start`.
        best_step, best_metric: of the model in the root of the run.
        skipped: steps skipped so far, those of earlier starts included.
        signal: whether the run was asked to stop.
        flush_steps: results that may wait to be written.
    """

    def __init__(self, trainer: ZOTrainer, base_model: str | None, config: dict[str, Any] | None) -> None:
        self.trainer = trainer
        self.config = config
        self.base = {"base_model": base_model} if base_model else {}
        self.best_step: int | None = None
        self.best_metric: float | None = None
        self._best_loss: float | None = None
        self.signal = StopSignal()
        self.flush_steps = 1 if trainer.args.device.type == "cpu" else FLUSH_STEPS
        self._best_key: str | None = None
        self._journal: Journal | None = None
        self._pending: list[tuple[StepResult, float]] = []
        self._clock = self._flushed = time.monotonic()
        self._there_before: set[Path] = set()
        self._failed_at_once = False
        self._settled = False
        self._began_with: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}
        self.skipped = self._skipped_in_a_row = 0
        self.not_finite_before: dict[str, int] = {}
        self._last_evaluations: dict[str, dict[str, Any]] = {}  # by the name of the loss: one for each evaluation set
        self._total = self._count = 0.0
        self._window: list[tuple[float, float]] = []  # (loss, |projected gradient|) of the steps since the last log

    # --- begin and end -----------------------------------------------------------------------------------------

    def open(self, start: Start) -> None:
        """Make the folder ready for the step after ``start``: configuration, journal, metrics."""
        trainer, run = self.trainer, self.trainer.run
        run.path.mkdir(parents=True, exist_ok=True)
        self._there_before, self._failed_at_once = set(run.path.rglob("*")), False
        self._pending, self._window, self._total, self._count = [], [], 0.0, 0.0
        self.best_step = self.best_metric = self._best_key = self._best_loss = None
        self.skipped = self._skipped_in_a_row = 0
        self._last_evaluations = {}
        for line in start.evaluations:
            self._last_evaluations.update(dict.fromkeys(_losses(line), line))
        if not start.finished:
            if not start.step or not run.config_file.is_file():
                options = {k: v for k, v in trainer.args.to_dict().items() if not k.startswith(("hub_", "push_"))}
                config = self.config or {"options": options}
                run.write_config(
                    config.get("model", self.base.get("base_model")), config["options"], config.get("task")
                )
            if not start.step:
                save_settings(trainer.zm.model, run.path, trainer.tokenizer())
        self._settled, self._began_with, self.plan = False, start.environment, start.plan
        self._journal = start.journal or Journal.start(run.journal_file, start.header)
        self._cut_metrics(start)
        for line in start.evaluations:
            self._is_best(line, line["step"])
        self._clock = self._flushed = time.monotonic()

    def _cut_metrics(self, start: Start) -> None:
        """Drop the lines after ``start`` and write those that a kill kept from being written."""
        metrics, reached, end = self.trainer.run.metrics, 0, 0
        for begin, stop, line in metrics.read():
            if line["step"] > start.step:
                end = begin
                break
            end = stop
            if "projected_grad" in line:
                reached = line["step"]
        metrics.cut(end)
        assert self._journal is not None
        logged = start.step - start.step % max(1, int(start.state.logging_steps))
        for record in self._journal.entries():
            step = record["step"] + 1
            self._count_in(record, since=logged)
            if step > reached:
                metrics.append(self._metrics_line(record, None))

    def close(self, interrupted: bool) -> None:
        """After the last step: the model in the root where no evaluation chose one, and the status.

        Raises:
            ZOError: the weights or the losses have ended as something that is not finite.
        """
        self.flush()
        step = self.trainer.zm.step_count
        if not interrupted:
            self._check_end(step)
        if self.best_step is None:
            self._write_root()
        self._set_status(state="interrupted" if interrupted else "finished", step=step)
        self._close_files(sync=True)

    def _check_end(self, step: int) -> None:
        """Fail where a run has come to its last step, and to nothing: what it holds from before stays."""
        self._check_moved()
        wrong = [name for name, line in self._last_evaluations.items() if not _finite(line[name])]
        if wrong:
            at = self._last_evaluations[wrong[0]]["step"]
            self._fail(f"the evaluation at step {at} gave a {wrong[0].removeprefix('eval_')} that is not finite")
        last = min(max(LAST_STEPS, step // 100), step - 1)
        if self._skipped_in_a_row >= max(1, last):
            skipped = self._skipped_in_a_row
            what = "the last step was" if skipped == 1 else f"the last {skipped} steps were all"
            self._fail(f"{what} skipped, up to step {step}: a loss was not finite")

    def _check_moved(self) -> None:
        """Fail where what moved is not finite, and was when it began: such weights are never handed out."""
        for name, count in self.not_finite().items():
            if count > self.not_finite_before.get(name, 0):
                self._fail(f"after step {self.trainer.zm.step_count} the weights are not finite ({name})")

    def not_finite(self) -> dict[str, int]:
        """Of what moves: name → number of elements that are not finite."""
        return elements_not_finite((parameter.name, parameter.tensor) for parameter in self.trainer.zm.parameters)

    def _fail(self, reason: str, helps: str = _HELPS) -> NoReturn:
        """End the run as failed: the status says why."""
        self._set_status(state="failed", reason=reason, step=self.trainer.zm.step_count)
        kept = "" if self.best_step is None else f"; the model of step {self.best_step} is kept"
        raise ZOError(f"the run failed: {reason}; {helps}{kept}")

    def abandon(self) -> None:
        """On the way out with an error: keep what is known, and add no second error.

        Of a start whose first loss was not finite, nothing is kept: there may even be an untuned "best" model.
        """
        try:
            self._write_pending()
        except Exception:  # the first error is the one to tell
            self._pending = []
        self._close_files(sync=False)
        if self._failed_at_once:
            self._remove_what_is_new()

    def _remove_what_is_new(self) -> None:
        """After a start that came to nothing: the folder as it was before, so that the same call works again."""
        run = self.trainer.run
        for path in sorted(run.path.rglob("*"), reverse=True):
            if path not in self._there_before:
                remove(path)

    def _close_files(self, sync: bool) -> None:
        for lines in (self._journal, self.trainer.run.metrics):
            if lines is not None:
                if sync:
                    lines.sync()
                lines.close()

    def planned(self, **facts: Any) -> None:
        """Take what was settled at the first start: it stays with the run, in the journal and the checkpoints."""
        self.plan.update(facts)
        if self._journal is not None and not self.trainer.zm.step_count:
            self._journal.settle(plan=self.plan)
        self._set_status(plan=self.plan)

    @property
    def came_to_nothing(self) -> bool:
        """Whether the start failed before a first step: :meth:`abandon` has left the folder as it was before."""
        return self._failed_at_once

    def failed_at_once(self) -> None:
        """The start came to nothing: :meth:`abandon` then leaves the folder as it was before."""
        self._pending, self._failed_at_once = [], True

    # --- steps -------------------------------------------------------------------------------------------------

    def stepped(self, result: StepResult) -> None:
        """Take a step's result; called right after its update.

        Raises:
            ZOError: the first loss is not finite, or ``max_skipped`` in a row were not.
        """
        now = time.monotonic()
        self._pending.append((result, now - self._clock))
        self._clock = now
        first = self.trainer.zm.step_count == 1
        if first and bool(result.skipped):
            self.failed_at_once()
            self.trainer.refuse_wrong_labels()
            raise not_finite(result.losses)
        self._settle_environment()
        if first or len(self._pending) >= self.flush_steps or now - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _settle_environment(self) -> None:
        """After the first step of this process: which engine ran, and under which schedule, is now known."""
        if self._settled or self._journal is None:
            return
        self._settled = True
        ours = environment(self.trainer.zm)
        if self.trainer.zm.step_count == 1:
            self._journal.settle(environment=ours)
        elif self._began_with:
            say_differences(self._began_with, ours, ("engine", "memory"))

    def flush(self) -> None:
        """Write what is pending to journal and metrics.

        Raises:
            ZOError: too many skipped steps in a row, or the disk is full.
        """
        self._write_pending()
        self.trainer.refuse_wrong_labels()
        most = self.trainer.args.max_skipped
        if self._skipped_in_a_row >= most:
            self._fail(
                f"{self._skipped_in_a_row} steps in a row had a loss that is not finite (max_skipped={most}), up to "
                f"step {self.trainer.zm.step_count}"
            )

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._flushed = time.monotonic()
        if not pending or self._journal is None:
            return
        records = [result.record() for result, _ in pending]
        self._journal.append(*records)
        mean_seconds = sum(seconds for _, seconds in pending) / len(pending)
        self.trainer.run.metrics.append(*(self._metrics_line(record, mean_seconds) for record in records))
        for record in records:
            if record["skipped"] and not self.skipped:
                self._warn_of_skipped(record["step"] + 1)
            self._count_in(record, since=0)

    def _warn_of_skipped(self, step: int) -> None:
        warnings.warn(
            f"step {step} was skipped, its loss or projected gradient is not finite: the weights stay as they were, "
            f"and later skipped steps are counted; if there are many, {_HELPS}",
            ZOWarning,
            stacklevel=2,
        )

    def _count_in(self, record: dict[str, Any], since: int) -> None:
        self.skipped += bool(record["skipped"])
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record["skipped"] else 0
        loss, projected_grad = _loss(record), _projected_grad(record)
        if math.isfinite(loss):
            self._total, self._count = self._total + loss, self._count + 1
            if record["step"] >= since:
                self._window.append((loss, projected_grad))

    def _metrics_line(self, record: dict[str, Any], seconds: float | None) -> dict[str, Any]:
        estimates = record["projected_grad"]
        line = {
            "step": record["step"] + 1,
            "loss": _loss(record),
            "projected_grad": estimates[0] if len(estimates) == 1 else estimates,
            "lr": record["lr"],
        }
        if record["skipped"]:
            line["skipped"] = True
        return {**line, "seconds": None if seconds is None else round(seconds, 6)}

    def logged(self) -> dict[str, float]:
        """Mean loss and |projected gradient| of the finite steps since the last log, for the Trainer's log.

        ``skipped_steps``, the number so far, is among it where there are any.
        """
        self.flush()
        window, self._window = self._window, []
        skipped = {"skipped_steps": self.skipped} if self.skipped else {}
        if not window:
            return {"loss": math.nan, **skipped}
        loss, projected_grad = (sum(values) / len(window) for values in zip(*window, strict=True))
        return {"loss": loss, "projected_grad": projected_grad, **skipped}

    def mean_loss(self) -> float:
        """Mean loss of the run's finite steps."""
        return self._total / self._count if self._count else math.nan

    # --- evaluations and checkpoints ---------------------------------------------------------------------------

    def evaluated(self, metrics: dict[str, Any], step: int, sums: Evaluation, prefix: str) -> None:
        """Take an evaluation: the best model goes to the root of the run, then the line to metrics.jsonl.

        Args:
            metrics: as the Trainer has them, their names begin with ``prefix``.
            sums: what they are means of.

        Raises:
            ZOError: a loss before the first step is not finite, or weights are not that would become the best model.
        """
        kept = {k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(_SPEED)}
        line: dict[str, Any] = {"step": step, **{k: v for k, v in kept.items() if isinstance(v, int | float)}}
        if step == 0:
            self._check_start(line, sums)
        rows = sums.rows()
        if rows:
            if step == 0:
                self.trainer.run.keep_before(prefix, {"rows": rows})
            before = (self.trainer.run.before().get(prefix) or {}).get("rows")
            line[f"{prefix}_rows"] = measure_certainty(rows, before)
        self._last_evaluations.update(dict.fromkeys(_losses(line), line))
        if self._is_best(line, step):
            self._write_root()
            self._set_status(best_step=self.best_step, best_metric=self.best_metric, metric=self._best_key)
        self.trainer.run.metrics.append(line)

    def _check_start(self, line: dict[str, Any], sums: Evaluation) -> None:
        """Refuse evaluation data on which the untuned model has no loss: no model of the run could be the best."""
        wrong = [name for name, value in _losses(line).items() if not _finite(value)]
        if not wrong:
            return
        losses = sums.rows().get("loss", {}).get("sums", [])
        row = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        where = "" if row is None else f", first in row {row} of the evaluation data (counted from 0)"
        self.failed_at_once()
        raise ZOError(
            f"the evaluation before the first step gives a {wrong[0].removeprefix('eval_')} that is not finite{where}: "
            "check its data and labels; for a 16-bit model try dtype float32 or bfloat16"
        )

    def _is_best(self, metrics: dict[str, Any], step: int) -> bool:
        args = self.trainer.args
        if self._best_key is None:
            self._best_key = _choose_key(metrics, args.metric_for_best_model)
        value = metrics.get(self._best_key) if self._best_key else None
        losses = [v for k, v in metrics.items() if k.endswith("loss")]
        if value is None or any(v is None or not math.isfinite(v) for v in (value, *losses)):
            return False
        greater = args.greater_is_better if args.metric_for_best_model else not str(self._best_key).endswith("loss")
        loss = metrics.get(str(self._best_key).rpartition("_")[0] + "_loss")
        best, best_loss = self.best_metric, self._best_loss
        better = best is None or (value > best if greater else value < best)
        # Of few rows as many are often right at several steps: the loss then tells them apart.
        tied = value == best and loss is not None and best_loss is not None and loss < best_loss
        if not (better or tied):
            return False
        self.best_step, self.best_metric, self._best_loss = step, float(value), loss
        return True

    def checkpoint(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            ZOError: the weights are not finite; earlier checkpoints stay.
        """
        trainer = self.trainer
        self.flush()
        self._check_moved()
        for lines in (self._journal, trainer.run.metrics):
            if lines is not None:
                lines.sync()
        state = trainer.state
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()  # type: ignore[index,call-overload]
        trainer.run.save_checkpoint(
            state.global_step,
            trainer.zm,
            dataclasses.asdict(state),
            keep=trainer.args.save_total_limit or 0,
            plan=self.plan,
        )
        self._set_status(step=state.global_step)

    def _write_root(self) -> None:
        trainer = self.trainer
        self._check_moved()
        metadata = {**trainer.zm.facts(), **self.base}
        save_model(trainer.zm.model, trainer.run.path, metadata, tokenizer=trainer.tokenizer())

    def _set_status(self, **values: Any) -> None:
        self.trainer.run.update_status(**values)


def _loss(record: dict[str, Any]) -> float:
    """What the step reported: the mean over its evaluations."""
    return record["loss"]


def _losses(line: dict[str, Any]) -> dict[str, Any]:
    """The losses in a line of metrics.jsonl."""
    return {name: value for name, value in line.items() if name.startswith("eval_") and name.endswith("loss")}


def _finite(value: Any) -> bool:
    """Whether a number is finite; None is what metrics.jsonl holds for one that is not."""
    return value is not None and math.isfinite(value)


def _projected_grad(record: dict[str, Any]) -> float:
    """Mean |projected gradient| over the step's directions."""
    return sum(map(abs, record["projected_grad"])) / len(record["projected_grad"])


def _choose_key(metrics: dict[str, Any], asked: str | None) -> str | None:
    """The metric that chooses the best model: the one asked for, else accuracy, else the loss."""
    if asked:
        key = f"eval_{asked.removeprefix('eval_')}"
        return key if key in metrics else None
    endings = ("eval_accuracy", "eval_loss", "_accuracy", "_loss")
    return next((key for ending in endings for key in metrics if key.endswith(ending)), None)
