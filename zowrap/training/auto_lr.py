"""What a training settles at its first start, so that going on with it settles nothing again: its learning rate.

The plan of a run stands in the header of its journal and in every checkpoint, see
:class:`zowrap.training.resume.Start`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from zowrap.calibration.learning_rate import tune_lr
from zowrap.errors import ZOError
from zowrap.machine import preserve_rng
from zowrap.training.resume import Start, say
from zowrap.training.writer import Interrupted, Keeper

if TYPE_CHECKING:
    from zowrap.training.trainer import ZOTrainer


def settle_lr(trainer: ZOTrainer, keeper: Keeper, start: Start) -> None:
    """The run's learning rate: what it began with, else the one given, else the choice of :func:`zowrap.tune_lr`.

    Raises:
        Interrupted: the run was asked to stop while it chose.
        ZOError: there is nothing to choose from; the folder is left as it was before.
    """
    args, began_with = trainer.args, start.plan.get("learning_rate")
    if began_with is not None:
        if args.auto_lr:
            say(f"going on with learning rate {began_with:g}, as it was chosen at the first start")
        elif began_with != args.learning_rate:
            say(f"going on with learning rate {began_with:g}, as the run began, not {args.learning_rate:g}")
        args.learning_rate = began_with
    elif args.auto_lr:  # of a run from before there was a plan, the rate of its last step
        args.learning_rate = trainer.zm.lr if start.step else _choose(trainer, keeper, start.state.max_steps)
    keeper.planned(learning_rate=args.learning_rate)
    if not start.step:
        trainer.zm.lr = float(args.learning_rate)  # type: ignore[arg-type]


def _choose(trainer: ZOTrainer, keeper: Keeper, steps: int) -> float:
    """``lr="auto"``, on the batches that the first steps will see."""

    def watch(done: int, most: int) -> None:
        if keeper.signal.stopped:
            raise Interrupted
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "on_choose_lr"):
                callback.on_choose_lr(done, most)

    schedule = _schedule(trainer.args, steps)
    try:
        with preserve_rng(trainer.args.device):
            choice = tune_lr(trainer.zm, _first_batches(trainer), steps, schedule=schedule, watch=watch)
    except ZOError:
        keeper.failed_at_once()
        raise
    keeper.planned(choice=choice.record(), learning_rate=choice.lr)
    say(str(choice))
    return choice.lr


def _first_batches(trainer: ZOTrainer) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of the first steps, read past what counts them for the training loop."""
    loader: Any = trainer.get_train_dataloader()
    batches = iter(getattr(loader, "base_dataloader", loader))
    while group := list(itertools.islice(batches, trainer.args.gradient_accumulation_steps)):
        yield [trainer.prepared(batch) for batch in group]


def _schedule(args: Any, steps: int) -> Callable[[int], float] | None:
    """Step t's learning rate in units of the first; ``None`` where it follows from what is measured on the way."""
    scheduler: Any = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0] if hasattr(scheduler, "lr_lambdas") else None
