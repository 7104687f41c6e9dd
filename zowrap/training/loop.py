"""The counts of the Trainer's loop: the steps of a run and of an epoch, and what is due after a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

if TYPE_CHECKING:
    from zowrap.training.config import ZOConfig


def make_first_state(args: ZOConfig, make_batches: Callable[[], Any]) -> TrainerState:
    """Return the state before the first step, as the Trainer itself makes it.

    Args:
        args: the Trainer's arguments.
        make_batches: makes the batches of an epoch; called only where the length of the run depends on their number.
    """
    state = TrainerState(train_batch_size=args.train_batch_size)
    state.max_steps = args.max_steps
    if args.max_steps <= 0:
        state.max_steps = math.ceil(args.num_train_epochs * (count_steps_per_epoch(args, make_batches()) or 0))
    state.compute_steps(args, state.max_steps)
    return state


def count_steps_per_epoch(args: Any, batches: Any) -> int | None:
    """Return the number of updates in one pass over ``batches``; ``None`` where it is unknown."""
    try:
        return max(1, math.ceil(len(batches) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def acts_at_epoch_end(args: Any) -> bool:
    """Whether an evaluation or a checkpoint is due at the end of each epoch."""
    return "epoch" in (args.eval_strategy, args.save_strategy)


def is_something_due(args: Any, step: int, state: TrainerState) -> bool:
    """Whether an evaluation, a checkpoint or the end of the run may be due after ``step``."""
    if acts_at_epoch_end(args) or step >= state.max_steps:
        return True
    evaluates = args.eval_strategy == "steps" and step % max(1, int(state.eval_steps)) == 0
    saves = args.save_strategy == "steps" and step % max(1, int(state.save_steps)) == 0
    return evaluates or saves
