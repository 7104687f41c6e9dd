"""Measure the memory that a rule and everything around it hold between two steps.

The measurement does not rely on the rule's description: it wraps a model of one matrix, makes a step, and counts every
tensor that is alive and was not before, whoever holds it. The directions and perturbed weights of a step do not count,
because they are gone after it (the eager engine forms them during the step, the compiled one never does).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zowrap.model.zo_model import ZOModel
from zowrap.rules.base import Rule
from zowrap.wrap import zo_wrap

SIDE = 512  # of the matrix: small enough to measure all rules in a second or two


def measure_extra_memory(rules: Sequence[Rule], side: int = SIDE) -> list[float]:
    """Measure the bytes that each rule holds beyond the model after a step, in units of the float32 weights.

    It uses the eager engine, since both engines hold the same between steps; a rule takes a few hundredths of a second.
    Low-rank rules hold a multiple of ``side``, so their share falls with 1/``side``.
    """
    for rule in rules:
        _step_once(rule, side)  # build the tables that exist once per process and do not belong to a rule
    gc.collect()
    gc.freeze()  # leaves what is alive now out of the count
    try:
        return [_measure_held_bytes(rule, side) / (4 * side * side) for rule in rules]
    finally:
        gc.unfreeze()


def _measure_held_bytes(rule: Rule, side: int) -> int:
    zm = _step_once(rule, side)
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) - sum(p.untyped_storage().nbytes() for p in zm.model.parameters())


def _step_once(rule: Rule, side: int) -> ZOModel:
    """Wrap a model of one matrix with the rule, and make one step."""
    model = nn.Linear(side, side, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zm = zo_wrap(model, rule, engine="eager", loss_fn=lambda model, batch: model(batch["x"]).square().mean())
        zm.step(x=torch.ones(1, side))
    return zm
