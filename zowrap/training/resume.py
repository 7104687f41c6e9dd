"""Where a run goes on: the newest checkpoint, then the journal after it.

The journal holds every step that was finished, but what is due after a step (an evaluation, a checkpoint) may have
been cut off with the process. A last step of which that can be so is done once more, bitwise the same, together with
what is due after it; every other step is replayed from its record.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from zowrap.errors import ZOError
from zowrap.storage.atomic import contains, is_same_place, remove
from zowrap.training.checkpoint import checkpoint_facts, load_checkpoint
from zowrap.training.journal import Journal, describe
from zowrap.training.replay import check_start, replay

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel
    from zowrap.training.config import ZOConfig
    from zowrap.training.trainer import ZOTrainer


@dataclass
class Start:
    """Where a training begins.

    Attributes:
        step: steps already done.
        state: the Trainer's state after them.
        journal: the journal to append to; ``None`` for a new one.
        header: what run this is.
        finished: nothing is left to do.
        evaluations: the lines of metrics.jsonl that are evaluations, up to ``step``.
        metric: the metric that a plateau schedule follows.
        environment: what the run began with, see :func:`zowrap.training.journal.environment`.
        plan: what was settled at the first start and stays: ``steps`` planned, ``learning_rate`` before any schedule,
            and where it was chosen, ``choice`` (:meth:`zowrap.calibration.learning_rate.LearningRate.record`).
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

    def scheduler_steps(self, scheduler: Any) -> Iterable[tuple[float, ...]]:
        """The arguments of the calls of ``scheduler.step`` that were made so far."""
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        if isinstance(scheduler, plateau) or type(scheduler).__name__ == "GreedyLR":
            key = f"eval_{(self.metric or 'loss').removeprefix('eval_')}"
            return [(line[key],) for line in self.evaluations if line["step"] > 0 and line.get(key) is not None]
        return [()] * self.step


def say(sentence: str) -> None:
    """Tell the user, without touching what standard output is for."""
    print(sentence, file=sys.stderr, flush=True)


def find_start(trainer: ZOTrainer, resume: str | bool | None) -> Start:
    """Decide where training begins, and bring the model there.

    Args:
        resume: True: as far as ``output_dir`` reaches. A path: that checkpoint. False or None: from the first step.

    Raises:
        ZOError: the folder holds another run, or a run although it is to start from the first step.
    """
    run, first = trainer.run, _first_state(trainer)
    recorded_plan = _recorded_plan(trainer, resume)
    plan = {"steps": first.max_steps} if recorded_plan is None else recorded_plan
    trainer.wrap_for(plan.get("steps"))
    header = describe(trainer.zm, blocks=trainer.args.blocks, model_name=trainer._keeper.base.get("base_model"))
    header["plan"] = plan
    fresh = Start(0, first, None, header, plan=plan)
    if not resume:
        return _from_the_first_step(trainer, fresh)
    if not isinstance(resume, bool) and not is_same_place(Path(resume), run.path):
        return _from_checkpoint(trainer, Path(resume), header)
    run.clean()
    journal = Journal.resume(run.journal_file, header)
    recorded = journal.steps() if journal else 0
    saved = max(run.checkpoints(), default=0)
    status = run.status().get("state")
    step = max(saved, recorded)
    state = fresh.state
    if recorded > saved and (status != "finished" or step < state.max_steps) and _may_be_cut(trainer, recorded, state):
        step -= 1
    if step == 0:
        say(f"{run.path} has nothing to go on from: starting from the first step")
        return _from_the_first_step(trainer, fresh, clear=True)
    began_with = (journal.header.get("environment") if journal else None) or {}
    if saved and not began_with:
        began_with = checkpoint_facts(run.checkpoint(saved), "environment")
    zm = _use_environment(trainer, began_with, header["environment"])
    if saved:
        state = _state_of(load_checkpoint(run.checkpoint(saved), zm))
    elif journal is not None and zm.step_count == 0:
        check_start(zm, journal)
    if journal is not None:
        if zm.step_count > step:
            raise ZOError(f"the model has moved past step {step}, where this run goes on: load the base model anew")
        replay(zm, journal, until=step)
        journal.keep(step)
    state.global_step = step
    evaluations = [line for _, _, line in run.metrics.read() if line["step"] <= step and "projected_grad" not in line]
    done = step >= fresh.state.max_steps and status == "finished"
    return Start(step, state, journal, header, done, evaluations, trainer.args.metric_for_best_model, began_with, plan)


def _recorded_plan(trainer: ZOTrainer, resume: str | bool | None) -> dict[str, Any] | None:
    """The plan of the run that is gone on with; ``None`` where there is none to go on with."""
    run = trainer.run
    if not resume:
        return None
    if not isinstance(resume, bool) and not is_same_place(Path(resume), run.path):
        return checkpoint_facts(Path(resume), "plan")
    run.clean()
    journal = Journal.read_from(run.journal_file)
    if journal is not None:
        return journal.header.get("plan") or {}
    saved = max(run.checkpoints(), default=0)
    return checkpoint_facts(run.checkpoint(saved), "plan") if saved else None


def _from_the_first_step(trainer: ZOTrainer, fresh: Start, clear: bool = False) -> Start:
    run = trainer.run
    trainer.plan_for(fresh.plan.get("steps"))
    if trainer.zm.step_count:
        raise ZOError(f"the model has already moved {trainer.zm.step_count} steps: make a new trainer with a new model")
    base = trainer._keeper.base.get("base_model")
    if (
        base
        and Path(base).exists()
        and (is_same_place(base, run.path) or (trainer.args.overwrite and contains(run.path, base)))
    ):
        raise ZOError(f"{run.path} is the model's own folder: the run would replace the model it starts from")
    if run.exists() and not (clear or trainer.args.overwrite):
        raise ZOError(
            f"{run.path} already holds a run: go on with it (resume_from_checkpoint=True), "
            "give another output_dir, or overwrite=True"
        )
    run.clean()
    for step in run.checkpoints():
        remove(run.checkpoint(step))
    remove(run.journal_file)
    remove(run.metrics.path)
    remove(run.before_file)
    return fresh


def _from_checkpoint(trainer: ZOTrainer, checkpoint: Path, header: dict[str, Any]) -> Start:
    """Go on from one checkpoint, whatever came after it."""
    run = trainer.run
    inside = is_same_place(checkpoint.parent, run.path)
    if not inside and run.exists():
        raise ZOError(f"{run.path} already holds a run: {checkpoint} of another one cannot go on there")
    journal = Journal.resume(run.journal_file, header) if inside else None
    began_with = (journal.header.get("environment") if journal else None) or checkpoint_facts(checkpoint, "environment")
    zm = _use_environment(trainer, began_with, header["environment"])
    header = {**header, "environment": began_with or header["environment"]}  # of a journal that begins in the middle
    state = _state_of(load_checkpoint(checkpoint, zm))
    step = state.global_step = zm.step_count
    if journal is not None:
        later = [s for s in run.checkpoints() if s > step]
        if later or journal.steps() > step:
            say(f"going back to step {step} of {run.path}: what came after it is removed")
        for each in later:
            remove(run.checkpoint(each))
        journal.keep(step)
    evaluations = [line for _, _, line in run.metrics.read() if line["step"] <= step and "projected_grad" not in line]
    plan, metric = header["plan"], trainer.args.metric_for_best_model
    return Start(step, state, journal, header, False, evaluations, metric, began_with, plan)


def _use_environment(trainer: ZOTrainer, theirs: dict[str, Any], ours: dict[str, Any]) -> ZOModel:
    """Take the run's thread count and engine, and say what else differs. Returns the wrapped model to go on with.

    A run that was to be compiled and turned out to be eager stays eager. One that was compiled and no longer can be
    is told of after its next step: going on matters more than the last bits.
    """
    threads = theirs.get("threads")
    if threads and threads != ours["threads"]:
        torch.set_num_threads(threads)
        say(f"going on with {threads} threads, as the run began")
    say_differences(theirs, ours, ("torch", "device"))
    if theirs.get("engine") == "eager" and trainer.args.engine is None and not trainer.zm.step_count:
        say("going on with the eager engine, as the run began")
        trainer.wrap("eager")
    return trainer.zm


def say_differences(theirs: dict[str, Any], ours: dict[str, Any], names: Iterable[str]) -> None:
    """Say what of the environment is not as the run began: the last bits of later steps may then differ."""
    for name in names:
        if theirs.get(name, ours[name]) != ours[name]:
            say(
                f"the run began with {name} {theirs[name]}, now it is {ours[name]}: later steps may differ in last bits"
            )


def _state_of(saved: dict[str, Any]) -> TrainerState:
    known = TrainerState.__dataclass_fields__
    return TrainerState(**{name: value for name, value in saved.items() if name in known})


def _first_state(trainer: ZOTrainer) -> TrainerState:
    """The Trainer's state before the first step, as it makes it itself."""
    args = trainer.args
    state = TrainerState(train_batch_size=args.train_batch_size)
    state.max_steps = args.max_steps
    if args.max_steps <= 0:
        state.max_steps = math.ceil(
            args.num_train_epochs * (steps_per_epoch(args, trainer.get_train_dataloader()) or 0)
        )
    state.compute_steps(args, state.max_steps)
    return state


def steps_per_epoch(args: ZOConfig, batches: Any) -> int | None:
    """Updates in one pass over ``batches``; ``None`` where their number is not known."""
    try:
        return max(1, math.ceil(len(batches) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def by_epoch(args: Any) -> bool:
    """Whether something is due at the end of each epoch."""
    return "epoch" in (args.eval_strategy, args.save_strategy)


def _may_be_cut(trainer: ZOTrainer, step: int, state: TrainerState) -> bool:
    """Whether something is due after ``step`` that the folder need not hold yet."""
    args = trainer.args
    if by_epoch(args) or step >= state.max_steps:
        return True
    evaluates = args.eval_strategy == "steps" and step % max(1, int(state.eval_steps)) == 0
    saves = args.save_strategy == "steps" and step % max(1, int(state.save_steps)) == 0
    return evaluates or saves
