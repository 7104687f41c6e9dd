"""Settling the learning rate of a run: its first start does so, and every later start keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import get_scheduler

from zowrap.calibration.learning_rate import tune_lr
from zowrap.machine import preserve_rng
from zowrap.training.messages import say

if TYPE_CHECKING:
    from zowrap.loss.module import Batch
    from zowrap.model.zo_model import ZOModel
    from zowrap.training.config import ZOConfig


def settle_lr(
    zm: ZOModel,
    args: ZOConfig,
    plan: dict[str, Any],
    steps: int,
    batches: Iterable[list[Batch]],
    watch: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return the learning rate that the run began with, else the one given, else the choice of :func:`zowrap.tune_lr`.

    Args:
        zm: the model, before its first step where there is a choice to make; only its ``lr`` may change.
        args: the options of the training.
        plan: what the run's first start settled; without a ``learning_rate`` before it did.
        steps: planned.
        batches: the micro-batches of the first steps; read only to choose.
        watch: called as ``watch(evaluations done, at most)`` while it chooses; it may raise to stop.

    Returns:
        What joins the plan: ``learning_rate``, before any schedule, and where it was chosen now, the record of the
        ``choice``.

    Raises:
        ZOError: no learning rate could be chosen.
    """
    began_with = plan.get("learning_rate")
    if began_with is not None:
        if args.auto_lr:
            say(f"going on with learning rate {began_with:g}, as it was chosen at the first start")
        elif began_with != args.learning_rate:
            say(f"going on with learning rate {began_with:g}, as the run began, not {args.learning_rate:g}")
        return {"learning_rate": began_with}
    if not args.auto_lr:
        return {"learning_rate": args.learning_rate}
    schedule = _make_schedule(args, steps)
    with preserve_rng(args.device):
        choice = tune_lr(zm, batches, steps, schedule=schedule, watch=watch)
    say(str(choice))
    return {"choice": choice.record(), "learning_rate": choice.lr}


def _make_schedule(args: ZOConfig, steps: int) -> Callable[[int], float] | None:
    """Return a step's learning rate in units of the first; ``None`` where it depends on the losses of the run."""
    options: Any = args
    scheduler: Any = get_scheduler(
        options.lr_scheduler_type,
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0] if hasattr(scheduler, "lr_lambdas") else None
