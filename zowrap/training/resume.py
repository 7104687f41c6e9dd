"""Finding where a run goes on: at its newest checkpoint and the journal after it.

The journal holds every finished step, but a kill may have cut off what was due after the last one (an evaluation, a
checkpoint). Where that is possible, the last step is made once more, bitwise the same, together with what is due after
it; every other step is replayed from its record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers import TrainerState

from zowrap.errors import ZOError
from zowrap.storage.atomic import contains, is_same_place, remove
from zowrap.training.checkpoint import load_checkpoint, read_checkpoint_facts
from zowrap.training.environment import say_differences
from zowrap.training.journal import Journal, describe
from zowrap.training.loop import is_something_due
from zowrap.training.messages import say
from zowrap.training.replay import check_start, replay
from zowrap.training.run_folder import Run

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel
    from zowrap.training.config import ZOConfig

# Wraps the model for a run of so many steps, with the engine of that name (None: the configured one). A second call
# wraps it again, before the first step.
WrapFn = Callable[[int, str | None], "ZOModel"]


@dataclass
class Start:
    """The point at which a training begins.

    Attributes:
        step: steps already done.
        state: the Trainer's state after them.
        journal: the journal to append to; ``None`` for a new one.
        header: the header of a new journal.
        finished: nothing is left to do.
        evaluations: the lines of metrics.jsonl that are evaluations, up to ``step``.
        metric: the metric that a plateau schedule follows.
        environment: the environment that the run began in, see
            :func:`zowrap.training.environment.describe_environment`; empty for a new run.
        plan: what the first start settles for the whole run: the planned ``steps``, the ``learning_rate`` before any
            schedule, and if that was chosen, the record of the ``choice``
            (:meth:`zowrap.calibration.learning_rate.LearningRate.record`). It is in the header of the journal and in
            every checkpoint.
        intervals: the steps between logs, evaluations and checkpoints before this start, where a checkpoint says them;
            ``state`` has those of now.
    """

    step: int
    state: TrainerState
    journal: Journal | None
    header: dict[str, Any]
    finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    metric: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)

    def scheduler_steps(self, scheduler: Any) -> Iterable[tuple[float, ...]]:
        """Return the arguments of every call of ``scheduler.step`` that was made so far."""
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        if isinstance(scheduler, plateau) or type(scheduler).__name__ == "GreedyLR":
            key = f"eval_{(self.metric or 'loss').removeprefix('eval_')}"
            return [(line[key],) for line in self.evaluations if line["step"] > 0 and line.get(key) is not None]
        return [()] * self.step


def find_start(
    run: Run,
    args: ZOConfig,
    wrap: WrapFn,
    first: TrainerState,
    resume: str | bool | None = None,
    base_model: str | None = None,
) -> Start:
    """Decide where a training begins, and bring the model there.

    Args:
        run: the folder to train into.
        args: the options of the training.
        wrap: wraps the model.
        first: the Trainer's state before the first step.
        resume: True: go on as far as the folder reaches. A path: go on from that checkpoint. False or None: begin with
            the first step.
        base_model: the name or folder of the base model, where it is known.

    Raises:
        ZOError: the folder holds another run, or holds a run although ``resume`` is not given.
    """
    plan = _read_plan(run, resume) or {"steps": first.max_steps}
    zm = wrap(plan["steps"], None)
    header = {**describe(zm, model_name=base_model), "plan": plan}
    search = _Search(run, args, wrap, base_model, zm, Start(0, first, None, header, plan=plan))
    if not resume:
        return search.start_over()
    if _names_checkpoint(resume, run):
        return search.go_back_to(Path(resume))
    return search.go_on()


def _names_checkpoint(resume: str | bool, run: Run) -> TypeGuard[str]:
    """Whether ``resume`` is the path of a checkpoint; the path of the run itself means no more than True."""
    return not isinstance(resume, bool) and not is_same_place(Path(resume), run.path)


def _read_plan(run: Run, resume: str | bool | None) -> dict[str, Any] | None:
    """Read the plan of the run to go on with; ``None`` where there is none."""
    if not resume:
        return None
    if _names_checkpoint(resume, run):
        return read_checkpoint_facts(Path(resume), "plan")
    run.clean()
    journal = Journal.read_from(run.journal_file)
    if journal is not None:
        return journal.header["plan"]
    saved = max(run.checkpoints(), default=0)
    return read_checkpoint_facts(run.checkpoint(saved), "plan") if saved else None


@dataclass
class _Search:
    """The search for a start, in the folder of a run.

    Attributes:
        zm: the model, wrapped for the steps planned.
        fresh: the start at the first step.
        intervals: see :class:`Start`.
    """

    run: Run
    args: ZOConfig
    wrap: WrapFn
    base_model: str | None
    zm: ZOModel
    fresh: Start
    intervals: dict[str, Any] = field(default_factory=dict)

    def start_over(self, clear: bool = False) -> Start:
        """Begin with the first step, in an empty folder or in one that may be cleared."""
        run, overwrite, base = self.run, self.args.overwrite, self.base_model
        if self.zm.step_count:
            raise ZOError(
                f"the model has already moved {self.zm.step_count} steps: make a new trainer with a new model"
            )
        if base and Path(base).exists() and (is_same_place(base, run.path) or (overwrite and contains(run.path, base))):
            raise ZOError(f"{run.path} is the model's own folder: the run would replace the model it starts from")
        if run.exists() and not (clear or overwrite):
            raise ZOError(
                f"{run.path} already holds a run: go on with it (resume_from_checkpoint=True), "
                "give another output_dir, or overwrite=True"
            )
        run.clean()
        for step in run.saved_models():
            remove(run.checkpoint(step))
        for file in (run.journal_file, run.metrics.path, run.before_file, run.history.path):
            remove(file)
        return self.fresh

    def go_on(self) -> Start:
        """Go on as far as checkpoints and journal reach.

        Raises:
            ZOError: the folder holds no run at all.
        """
        run, state = self.run, self.fresh.state
        run.clean()
        if not run.config_file.is_file() and not run.exists():
            raise ZOError(
                f"No valid checkpoint found in output directory ({run.path}), and no run that was begun: leave out "
                "resume_from_checkpoint to begin one"
            )
        journal = Journal.resume(run.journal_file, self.fresh.header)
        saved = max(run.checkpoints(), default=0)
        recorded = journal.steps() if journal else 0
        if self.zm.job.estimator.credit:  # there is no noise to replay: steps after the last checkpoint are done again
            recorded = min(recorded, saved)
        finished = run.status().get("state") == "finished"
        step = max(saved, recorded)
        done = finished and step >= state.max_steps
        # A callback's state is known as it was when the last step began, and not what that step made of it.
        due = is_something_due(self.args, recorded, state) or run.history.has_states()
        if recorded > saved and not done and due:
            step -= 1
        if step == 0:
            say(f"{run.path} has nothing to go on from: starting from the first step")
            return self.start_over(clear=True)
        if journal is not None:
            began_with = journal.header["environment"]
        else:
            began_with = read_checkpoint_facts(run.checkpoint(saved), "environment")
        zm = self._adopt(began_with)
        if saved:
            state = self._make_state(load_checkpoint(run.checkpoint(saved), zm))
        elif journal is not None and zm.step_count == 0:
            check_start(zm, journal)
        if journal is not None:
            if zm.step_count > step:
                raise ZOError(f"the model has moved past step {step}, where this run goes on: load the base model anew")
            replay(zm, journal, until=step)
            journal.keep(step)
        run.history.apply(state, after=saved, until=step)
        state.global_step = step
        return self._start_after(step, state, journal, began_with, finished=done)

    def go_back_to(self, checkpoint: Path) -> Start:
        """Go on from one checkpoint, of this folder or another, and drop what came after it here."""
        run = self.run
        inside = is_same_place(checkpoint.parent, run.path)
        if not inside and run.exists():
            raise ZOError(f"{run.path} already holds a run: {checkpoint} of another one cannot go on there")
        journal = Journal.resume(run.journal_file, self.fresh.header) if inside else None
        if journal is not None:
            began_with = journal.header["environment"]
        else:
            began_with = read_checkpoint_facts(checkpoint, "environment")
        zm = self._adopt(began_with)
        state = self._make_state(load_checkpoint(checkpoint, zm))
        step = state.global_step = zm.step_count
        if journal is not None:
            later = [each for each in run.saved_models() if each > step]
            if later or journal.steps() > step:
                say(f"going back to step {step} of {run.path}: what came after it is removed")
            for each in later:
                remove(run.checkpoint(each))
            journal.keep(step)
        return self._start_after(step, state, journal, began_with)

    def _start_after(
        self,
        step: int,
        state: TrainerState,
        journal: Journal | None,
        began_with: dict[str, Any],
        finished: bool = False,
    ) -> Start:
        lines = [line for _, _, line in self.run.metrics.read() if line["step"] <= step]
        return Start(
            step,
            state,
            journal,
            header={**self.fresh.header, "environment": began_with},  # a new journal begins in the middle of the run
            finished=finished,
            evaluations=[line for line in lines if "projected_grad" not in line],
            metric=self.args.metric_for_best_model,
            environment=began_with,
            plan=self.fresh.plan,
            intervals=self.intervals,
        )

    def _adopt(self, began_with: dict[str, Any]) -> ZOModel:
        """Adopt the run's thread count and engine, say what else differs, and return the model to go on with."""
        now, threads = self.fresh.header["environment"], began_with["threads"]
        if threads != now["threads"]:
            torch.set_num_threads(threads)
            say(f"going on with {threads} threads, as the run began")
        say_differences(began_with, now, ("torch", "device"))
        if began_with.get("engine") == "eager" and self.args.engine is None and not self.zm.step_count:
            say("going on with the eager engine, as the run began")
            self.zm = self.wrap(self.fresh.plan["steps"], "eager")
        return self.zm

    def _make_state(self, saved: dict[str, Any]) -> TrainerState:
        """Make the Trainer's state from a checkpoint, whichever version of transformers wrote it.

        How long the run is to be, and what is due when, follows from the options of now: a finished run may go on.
        """
        known = TrainerState.__dataclass_fields__
        state = TrainerState(**{name: value for name, value in saved.items() if name in known})
        names = ("logging_steps", "eval_steps", "save_steps")
        self.intervals = {name: getattr(state, name) for name in names}
        for name in ("max_steps", *names):
            setattr(state, name, getattr(self.fresh.state, name))
        return state
