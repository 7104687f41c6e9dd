"""Define the operator that represents the loss of label tokens in a captured program."""

from __future__ import annotations

from torch import Tensor

from zowrap.custom_op import Cost, Traits, operator
from zowrap.loss.module import sum_token_losses


@operator("token_losses", traits=Traits(), cost=Cost())
def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`zowrap.loss.module.sum_token_losses`."""
    return sum_token_losses(logits, labels)


@token_losses.register_fake
def _(logits, labels):
    return sum_token_losses(logits, labels)  # the full computation, from which capture learns which sizes are equal
