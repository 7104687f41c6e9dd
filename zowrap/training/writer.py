"""``RunWriter`` writes the files of a run: journal, metrics, checkpoints, and the best model."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zowrap.errors import ZOError, ZOWarning, not_finite
from zowrap.loss.evaluation import Evaluation, measure_certainty
from zowrap.model.zo_model import StepResult, ZOModel
from zowrap.storage.lines import Lines
from zowrap.storage.save import save_model, save_settings
from zowrap.training.best_model import BestModel, is_finite
from zowrap.training.checkpoint import keep_apart
from zowrap.training.environment import describe_environment, say_differences
from zowrap.training.journal import Journal, describe
from zowrap.training.resume import Start
from zowrap.training.run_folder import Run
from zowrap.training.step_log import StepLog, make_metrics_line
from zowrap.training.weight_check import WeightCheck

if TYPE_CHECKING:
    from transformers import TrainerState

    from zowrap.training.config import ZOConfig

# Reading a result waits for the device. On an accelerator results stay there and are read together, at most this many
# steps or seconds apart; on a CPU every record is written right after its step, so a kill loses that step at most.
FLUSH_STEPS, FLUSH_SECONDS = 50, 60.0
# A run whose last steps were all skipped ends without a loss: this many of them, or a hundredth of the run if more.
LAST_STEPS = 5
_HELPS = "a smaller lr or eps, or a model in float32, usually helps"
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")


class RunWriter:
    """Writes the files of a run from one start on; :meth:`open` comes first, :meth:`close` or :meth:`abandon` last.

    Args:
        run: the folder.
        zm: the model, at the step of ``start``.
        start: where the training begins.
        args: the options of the training.
        config: the content of ``zowrap.json``: ``model``, ``options`` and, if there is one, ``task``.
        facts: what the headers of weight files say besides :meth:`zowrap.ZOModel.facts`.
        tokenizer: written beside the model, if there is one.
        weights: knows which weights were not finite when the run began.
        write_model: writes the present model and the tokenizer into the folder that it is given, where that is not
            :func:`zowrap.storage.save.save_model`.
        check_labels: raises ZOError where a label of the steps so far named no class.

    Attributes:
        best: the best evaluation; the model of its step lies in the root of the run.
        log: counts the steps, those of earlier starts included.
        plan: what the run's first start settled, see :class:`zowrap.training.resume.Start`.
        start_failed: the start failed before its first step: :meth:`abandon` leaves the folder as it was before.
        flush_steps: results that may wait to be written.
    """

    def __init__(
        self,
        run: Run,
        zm: ZOModel,
        start: Start,
        args: ZOConfig,
        *,
        config: dict[str, Any],
        weights: WeightCheck,
        facts: dict[str, str] | None = None,
        tokenizer: Any = None,
        write_model: Callable[[Path], None] | None = None,
        check_labels: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.zm, self.args, self.config = run, zm, args, config
        self.facts, self.tokenizer, self.write_model = facts or {}, tokenizer, write_model
        self.best = BestModel(args.metric_for_best_model, args.greater_is_better)
        self.log = StepLog()
        self.plan = start.plan
        self.start_failed = False
        self.flush_steps = 1 if args.device.type == "cpu" else FLUSH_STEPS
        self._start, self._weights, self._check_labels = start, weights, check_labels
        self._journal = start.journal
        self._environment_known = False
        self._pending: list[tuple[StepResult, float]] = []
        self._clock = self._flushed = time.monotonic()
        self._entries_before: set[Path] = set()
        self._told: dict[int, set[str]] = {}  # step of the last evaluation → the names of its metrics
        self._last_evaluations: dict[str, dict[str, Any]] = {}  # by the name of the loss: one for each evaluation set

    # --- begin and end -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folder ready for the next step: configuration, journal, metrics."""
        run, start = self.run, self._start
        run.path.mkdir(parents=True, exist_ok=True)
        self._entries_before = run.list_entries()
        for line in start.evaluations:
            self._last_evaluations.update(dict.fromkeys(_pick_losses(line), line))
        if not start.finished:
            if not start.step or not run.config_file.is_file():
                run.write_config(
                    self.config["model"], self.config["options"], self.config.get("task"), self.config.get("data")
                )
            if not start.step:
                save_settings(self.zm.model, run.path, self.tokenizer)
        self._journal = self._journal or Journal.start(run.journal_file, start.header)
        run.history.keep(start.step)
        self._mend_metrics(self._journal)
        for line in start.evaluations:
            if self.best.is_beaten_by(line):
                self.best.keep(line)
        self._clock = self._flushed = time.monotonic()

    def _mend_metrics(self, journal: Journal) -> None:
        """Drop the lines after the start, add those that a kill kept from being written, and count the steps."""
        metrics, step, reached, end = self.run.metrics, self._start.step, 0, 0
        for begin, stop, line in metrics.read():
            if line["step"] > step:
                end = begin
                break
            end = stop
            if "projected_grad" in line:
                reached = line["step"]
        metrics.cut(end)
        logged = step - step % max(1, int(self._start.state.logging_steps))
        for record in journal.entries():
            self.log.add(record, logged=record["step"] < logged)
            if record["step"] + 1 > reached:
                metrics.append(make_metrics_line(record, None))

    def close(self, interrupted: bool) -> None:
        """After the last step, write the status and, where no evaluation chose a model, the last one.

        Raises:
            ZOError: the run ended with weights or losses that are not finite.
        """
        self.flush()
        step = self.zm.step_count
        if not interrupted:
            self._check_end(step)
        if self.best.step is None:
            self._check_weights()
            self._write_model()
        self.run.update_status(state="interrupted" if interrupted else "finished", step=step)
        self._close_files(sync=True)

    def abandon(self) -> None:
        """End with an error: write what is known, and raise no second error.

        A failed start leaves nothing behind: not even the untuned model, which an evaluation may have found the best.
        """
        try:
            self._write_pending()
        except Exception:  # the first error is the one to report
            self._pending = []
        self._close_files(sync=False)
        if self.start_failed:
            self.run.remove_all_but(self._entries_before)

    def mark_start_failed(self) -> None:
        """Have :meth:`abandon` leave the folder as it was before."""
        self._pending, self.start_failed = [], True

    def add_to_plan(self, **facts: Any) -> None:
        """Keep what the first start settled: in the status, the checkpoints and the header of a new journal."""
        self.plan.update(facts)
        if self._journal is not None and not self.zm.step_count:
            self._journal.amend_header(plan=self.plan)
        self.run.update_status(plan=self.plan)

    def change_model(self, zm: ZOModel) -> None:
        """Go on with another wrap of the model, before the first step."""
        self.zm = zm
        self._start.header.update(describe(zm, model_name=self._start.header["model"]))
        if self._journal is not None:
            self._journal.amend_header(**{**self._start.header, "plan": self.plan})

    def _close_files(self, sync: bool) -> None:
        for lines in self._files():
            if lines is not None:
                if sync:
                    lines.sync()
                lines.close()

    def _files(self) -> tuple[Lines | None, ...]:
        return (self._journal, self.run.metrics, self.run.history)

    # --- failures ----------------------------------------------------------------------------------------------

    def _check_end(self, step: int) -> None:
        """Fail a run whose last step left weights or a loss that is not finite; its earlier files stay."""
        self._check_weights()
        wrong = [name for name, line in self._last_evaluations.items() if not is_finite(line[name])]
        if wrong:
            at = self._last_evaluations[wrong[0]]["step"]
            self._fail(f"the evaluation at step {at} gave a {wrong[0].removeprefix('eval_')} that is not finite")
        last = min(max(LAST_STEPS, step // 100), step - 1)
        skipped = self.log.skipped_in_a_row
        if skipped >= max(1, last):
            which = "the last step was" if skipped == 1 else f"the last {skipped} steps were all"
            self._fail(f"{which} skipped, up to step {step}: a loss was not finite")

    def _check_weights(self) -> None:
        """Fail where a weight that was finite no longer is: such weights are never written."""
        name = self._weights.find_broken(self.zm.parameters)
        if name is not None:
            self._fail(f"after step {self.zm.step_count} the weights are not finite ({name})")

    def _check_first_evaluation(self, line: dict[str, Any], sums: Evaluation) -> None:
        """Refuse evaluation data on which the untuned model has no loss: no model of the run could be the best."""
        wrong = [name for name, value in _pick_losses(line).items() if not is_finite(value)]
        if not wrong:
            return
        losses = sums.rows().get("loss", {}).get("sums", [])
        row = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        where = "" if row is None else f", first in row {row} of the evaluation data (counted from 0)"
        self.mark_start_failed()
        raise ZOError(
            f"the evaluation before the first step gives a {wrong[0].removeprefix('eval_')} that is not finite{where}: "
            "check its data and labels; for a 16-bit model try dtype float32 or bfloat16"
        )

    def _fail(self, reason: str) -> NoReturn:
        """End the run as failed; the status says why."""
        self.run.update_status(state="failed", reason=reason, step=self.zm.step_count)
        kept = "" if self.best.step is None else f"; the model of step {self.best.step} is kept"
        raise ZOError(f"the run failed: {reason}; {_HELPS}{kept}")

    # --- steps -------------------------------------------------------------------------------------------------

    def add_step(self, result: StepResult) -> None:
        """Take a step's result, right after its update.

        Raises:
            ZOError: the first loss is not finite, or ``max_skipped`` in a row were not.
        """
        now = time.monotonic()
        self._pending.append((result, now - self._clock))
        self._clock = now
        first = self.zm.step_count == 1
        if first and bool(result.skipped):
            self.mark_start_failed()
            self._check_labels()
            raise not_finite(result.losses)
        self._note_environment()
        if first or len(self._pending) >= self.flush_steps or now - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _note_environment(self) -> None:
        """After the first step of this process, note which engine ran it, and under which schedule."""
        if self._environment_known or self._journal is None:
            return
        self._environment_known = True
        now = describe_environment(self.zm)
        if self.zm.step_count == 1:
            self._journal.amend_header(environment=now)
        elif self._start.environment:
            say_differences(self._start.environment, now, ("engine", "memory"))

    def flush(self) -> None:
        """Write the pending steps to journal and metrics.

        Raises:
            ZOError: too many skipped steps in a row, a label names no class, or the disk is full.
        """
        self._write_pending()
        self._check_labels()
        most = self.args.max_skipped
        if self.log.skipped_in_a_row >= most:
            self._fail(
                f"{self.log.skipped_in_a_row} steps in a row had a loss that is not finite (max_skipped={most}), up to "
                f"step {self.zm.step_count}"
            )

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._flushed = time.monotonic()
        if not pending or self._journal is None:
            return
        records = [result.record() for result, _ in pending]
        self._journal.append(*records)
        mean_seconds = sum(seconds for _, seconds in pending) / len(pending)
        self.run.metrics.append(*(make_metrics_line(record, mean_seconds) for record in records))
        for record in records:
            if record["skipped"] and not self.log.skipped:
                self._warn_of_skipped(record["step"] + 1)
            self.log.add(record)

    def _warn_of_skipped(self, step: int) -> None:
        warnings.warn(
            f"step {step} was skipped, its loss or projected gradient is not finite: the weights stay as they were, "
            f"and later skipped steps are counted; if there are many, {_HELPS}",
            ZOWarning,
            stacklevel=2,
        )

    def take_log(self) -> dict[str, float]:
        """Return what to log of the steps since the last call, see :meth:`zowrap.training.step_log.StepLog`."""
        self.flush()
        return self.log.take_window()

    # --- evaluations and checkpoints ---------------------------------------------------------------------------

    def add_evaluation(self, metrics: dict[str, Any], step: int, sums: Evaluation, prefix: str) -> None:
        """Take an evaluation: write the model to the root of the run if it is the best, then the line of metrics.jsonl.

        Args:
            metrics: as the Trainer has them; their names begin with ``prefix``.
            step: steps done.
            sums: the sums that they are means of.
            prefix: ``eval``, or another for each of several evaluation sets.

        Raises:
            ZOError: a loss before the first step is not finite, or weights are not that would become the best model.
        """
        line: dict[str, Any] = {"step": step, **_pick_metrics(metrics)}
        self._told = {step: self._told.get(step, set()) | line.keys()}
        if step == 0:
            self._check_first_evaluation(line, sums)
        rows = sums.rows()
        if rows:
            if step == 0:
                self.run.keep_before(prefix, {"rows": rows})
            before = (self.run.before().get(prefix) or {}).get("rows")
            line[f"{prefix}_rows"] = measure_certainty(rows, before)
        self._last_evaluations.update(dict.fromkeys(_pick_losses(line), line))
        if self.best.is_beaten_by(line):
            self._check_weights()  # before it is kept: the error names the model that lies in the root
            self.best.keep(line)
            self._write_model()
            self.run.update_status(best_step=self.best.step, best_metric=self.best.value, metric=self.best.key)
        self.run.metrics.append(line)

    def add_returned_metrics(self, metrics: dict[str, Any], step: int) -> None:
        """Take what an override of ``evaluate`` returns and told no callback: the Trainer compares models by it too."""
        told = self._told.get(step, set())
        new = {name: value for name, value in _pick_metrics(metrics).items() if name not in told}
        if new:
            self.add_evaluation(new, step, Evaluation(), "eval")

    def tell_best(self, state: TrainerState) -> None:
        """Say in the Trainer's state which model is the best and where it lies, if an evaluation chose one.

        Only at the end: with ``save_total_limit=1`` the Trainer removes all checkpoints but a best one that it knows.
        """
        if self.best.step is not None:
            state.best_metric, state.best_global_step = self.best.value, self.best.step
            state.best_model_checkpoint = str(self.run.path)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a checkpoint of the present step.

        Args:
            state: the Trainer's state.

        Raises:
            ZOError: the weights are not finite; earlier checkpoints stay.
        """
        self.flush()
        self._check_weights()
        for lines in self._files():
            if lines is not None:
                lines.sync()
        step = state["global_step"]
        self.run.save_checkpoint(
            step,
            self.zm,
            state,
            keep=self.args.save_total_limit or 0,
            plan=self.plan,
            tokenizer=self.tokenizer,
            write_model=self.write_model,
            model_only=self.args.save_only_model,
        )
        self.run.update_status(step=step)

    def _write_model(self) -> None:
        """Write the present model, whose weights are checked, to the root of the run."""
        if self.write_model is not None:
            self.write_model(self.run.path)
            return
        save_model(self.zm.model, self.run.path, {**self.zm.facts(), **self.facts}, tokenizer=self.tokenizer)
        keep_apart(self.run.path, self.zm)


def _pick_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of an evaluation that a line of metrics.jsonl keeps."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(_SPEED) and isinstance(value, int | float)
    }


def _pick_losses(line: dict[str, Any]) -> dict[str, Any]:
    """Return the losses in a line of metrics.jsonl."""
    return {name: value for name, value in line.items() if name.startswith("eval_") and name.endswith("loss")}
