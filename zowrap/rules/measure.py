"""What rules cost, measured: the memory that their state and everything around it hold between two steps.

Nothing is read off a rule's description: a model of one matrix is wrapped and stepped, then every tensor that is alive
and was not before is counted, whoever holds it. The directions and perturbed weights of a step are no part of it: they
are gone after the step (the eager engine forms them whole meanwhile, the compiled one never does).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zowrap.model import ZOModel
from zowrap.rules.base import Rule
from zowrap.wrap import zo_wrap

SIDE = 512  # of the matrix: large enough for a few rows or columns of state to be a small share of it


def extra_memory(rules: Sequence[Rule]) -> list[float]:
    """Bytes that each rule holds beyond the model after a step, in units P of the tuned weights in float32.

    Under the eager engine: what is held between steps is the same under both. A few hundredths of a second a rule.
    """
    for rule in rules:
        _step(rule)  # tables that are made once per process are no part of a rule
    gc.collect()
    gc.freeze()  # leaves what is alive now out of the count
    try:
        return [_held(rule) / (4 * SIDE * SIDE) for rule in rules]
    finally:
        gc.unfreeze()


def _held(rule: Rule) -> int:
    zm = _step(rule)
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) - sum(p.untyped_storage().nbytes() for p in zm.model.parameters())


def _step(rule: Rule) -> ZOModel:
    """A model of one matrix under the rule, after one step."""
    model = nn.Linear(SIDE, SIDE, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zm = zo_wrap(model, rule, engine="eager", loss_fn=lambda model, batch: model(batch["x"]).square().mean())
        zm.step(x=torch.ones(1, SIDE))
    return zm
