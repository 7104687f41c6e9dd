"""The operator that stands for the loss of label tokens while a model is captured."""

from __future__ import annotations

from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator
from zowrap.loss.module import token_sums


@operator("token_losses", traits=Traits(), cost=Cost())
def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`zowrap.loss.module.token_sums`."""
    return token_sums(logits, labels)


@token_losses.register_fake
def _(logits, labels):
    return token_sums(logits, labels)  # not its shape alone: capture learns from it which sizes must be equal
