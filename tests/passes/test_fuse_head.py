"""A vocabulary head and its loss become one operator; other losses are written out and compute the same values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.programs import after, captured, change, close, evaluate, operators, printed, tokens, wrap
from zowrap.errors import ZOInternalError
from zowrap.loss.module import LossFn, token_losses
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.fuse_head import LEAST_CLASSES, FuseHead
from zowrap.passes.strip_training import StripTraining

BEFORE = """
def forward(a_weight, b_weight, b_bias, batch_ids, batch_labels):
    embedding = zowrap.rows(a_weight, batch_ids)
    linear = aten.linear(embedding, b_weight, b_bias)
    slice_2 = aten.slice.Tensor(linear, 1, 0, -1)
    slice_4 = aten.slice.Tensor(batch_labels, 1, 1, 9223372036854775807)
    ne = aten.ne.Scalar(slice_4, -100)
    sum_1 = aten.sum.dim_IntList(ne, [-1])
    to = aten.to.dtype(sum_1, torch.float32)
    token_losses = zowrap.token_losses(slice_2, slice_4)
    div = aten.div.Tensor(token_losses, to)
    to_1 = aten.to.dtype(div, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, ones_like)
"""

AFTER = """
def forward(a_weight, b_weight, b_bias, batch_ids, batch_labels):
    embedding = zowrap.rows(a_weight, batch_ids)
    slice_4 = aten.slice.Tensor(batch_labels, 1, 1, 9223372036854775807)
    ne = aten.ne.Scalar(slice_4, -100)
    sum_1 = aten.sum.dim_IntList(ne, [-1])
    to = aten.to.dtype(sum_1, torch.float32)
    slice_tensor = aten.slice.Tensor(embedding, 1, 0, -1)
    head = zowrap.head(slice_tensor, b_weight, b_bias, None, None, slice_4)
    div = aten.div.Tensor(head, to)
    to_1 = aten.to.dtype(div, torch.float32)
    ones_like = aten.ones_like(to_1, pin_memory = False)
    return (to_1, ones_like)
"""

WRITTEN_OUT = {
    "aten.bitwise_or.Tensor": 1,
    "aten.clamp": 1,
    "aten.gather": 1,
    "aten.ge.Scalar": 1,
    "aten.logsumexp": 1,
    "aten.lt.Scalar": 1,
    "aten.ne.Scalar": 1,
    "aten.scalar_tensor": 2,
    "aten.squeeze.dim": 1,
    "aten.sub.Tensor": 1,
    "aten.sum.dim_IntList": 1,
    "aten.unsqueeze": 1,
    "aten.where.self": 2,
    "zowrap.token_losses": -1,
}


class Words(nn.Module):
    """A model with an embedding and a vocabulary head."""

    def __init__(self, classes: int = LEAST_CLASSES) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(ids))


WORDS = Words()


def next_tokens(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    sums, counts = token_losses(model(batch["ids"])[:, :-1], batch["labels"][:, 1:])
    return sums / counts


def padded(rows: int = 5, length: int = 7) -> dict[str, Tensor]:
    batch = tokens(rows, length)
    batch["labels"][0, length // 2 :] = -100
    return batch


@functools.cache
def prepared(model: nn.Module, loss_fn: LossFn = next_tokens):
    zm = wrap(model, loss_fn)
    return zm, captured(zm, padded(), StripTraining(), CheckLookups())


def test_the_text_of_two_layers() -> None:
    zm, program = prepared(WORDS)
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, FuseHead()), zm) == AFTER.strip()


def test_a_head_and_its_loss_are_one_operator() -> None:
    _, program = prepared(WORDS)
    fused = after(program, FuseHead())
    assert change(operators(program), operators(fused)) == {
        "aten.linear": -1,
        "zowrap.head": 1,
        "zowrap.token_losses": -1,
    }
    assert fused.notes["fuse_head"].startswith("1 heads fused with their loss, 0 losses of logits")


class Capped(Words):
    """A model with a soft cap between head and loss."""

    def forward(self, ids: Tensor) -> Tensor:
        return 5 * torch.tanh(super().forward(ids) / 5)


def with_penalty(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Compute a loss that reads the logits a second time."""
    logits = model(batch["ids"])
    sums, counts = token_losses(logits[:, :-1], batch["labels"][:, 1:])
    return sums / counts + 0.01 * logits.square().mean((1, 2))


OTHERS = {
    "few classes": (Words(LEAST_CLASSES - 1), next_tokens),
    "a soft cap": (Capped(), next_tokens),
    "another reader of the logits": (WORDS, with_penalty),
    "double precision": (Words().double(), next_tokens),
}


@pytest.mark.parametrize(("model", "loss_fn"), OTHERS.values(), ids=OTHERS)
def test_other_losses_of_logits_are_written_out(model, loss_fn) -> None:
    _, program = prepared(model, loss_fn)
    written = after(program, FuseHead())
    assert WRITTEN_OUT.items() <= change(operators(program), operators(written)).items()
    assert operators(written)["zowrap.head"] == 0
    assert written.notes["fuse_head"].startswith("0 heads fused with their loss, 1 losses of logits")


@pytest.mark.parametrize(("model", "loss_fn"), [(WORDS, next_tokens), *OTHERS.values()], ids=["a plain head", *OTHERS])
def test_losses_are_those_of_the_logits(model, loss_fn) -> None:
    zm, program = prepared(model, loss_fn)
    fused = after(program, FuseHead())
    for rows, length in ((5, 7), (3, 4), (2, 9)):
        batch = padded(rows, length)
        expected = loss_fn(zm.model, batch).detach().float()
        assert close([evaluate(program, zm, batch)[0]], [expected])
        assert close([evaluate(fused, zm, batch)[0]], [expected])


def test_a_second_time_nothing_is_left_to_do() -> None:
    zm, program = prepared(WORDS)
    once, twice = after(program, FuseHead()), after(program, FuseHead(), FuseHead())
    assert printed(twice, zm) == printed(once, zm)
    assert twice.notes["fuse_head"].startswith("0 heads")


def test_a_mark_that_was_left_breaks_the_promise() -> None:
    class Forgetful(FuseHead):
        def call(self, program) -> str:
            return "nothing done"

    _, program = prepared(WORDS)
    with pytest.raises(ZOInternalError, match="a mark for the loss of logits is left"):
        after(program, Forgetful())
