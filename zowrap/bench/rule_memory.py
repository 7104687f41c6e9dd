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

from zowrap.model.zo_model import ZOModel
from zowrap.rules.base import Rule
from zowrap.wrap import zo_wrap

SIDE = 512  # of the matrix: small enough for a table of all rules in a second or two


def extra_memory(rules: Sequence[Rule], side: int = SIDE) -> list[float]:
    """Bytes that each rule holds beyond the model after a step, in units P of the tuned weights in float32.

    Under the eager engine: what is held between steps is the same under both. A few hundredths of a second a rule.
    Low-rank rules hold a multiple of ``side``, a share that falls with 1/``side``.
    """
    for rule in rules:
        _step(rule, side)  # tables that are made once per process are no part of a rule
    gc.collect()
    gc.freeze()  # leaves what is alive now out of the count
    try:
        return [_held(rule, side) / (4 * side * side) for rule in rules]
    finally:
        gc.unfreeze()


def _held(rule: Rule, side: int) -> int:
    zm = _step(rule, side)
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) - sum(p.untyped_storage().nbytes() for p in zm.model.parameters())


def _step(rule: Rule, side: int) -> ZOModel:
    """A model of one matrix under the rule, after one step."""
    model = nn.Linear(side, side, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zm = zo_wrap(model, rule, engine="eager", loss_fn=lambda model, batch: model(batch["x"]).square().mean())
        zm.step(x=torch.ones(1, side))
    return zm
