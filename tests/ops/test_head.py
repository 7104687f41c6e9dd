"""The fused head computes the cross-entropy of logits without storing them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import batch, make
from tests.support.slow import slow_except
from zowrap.compiler.capture import canonical_batch, capture
from zowrap.loss.module import sum_token_losses, token_losses
from zowrap.ops import head as fused
from zowrap.ops import scratch
from zowrap.passes.fuse_head import FuseHead
from zowrap.passes.manager import run
from zowrap.passes.strip_training import StripTraining

zo = torch.ops.zowrap
CLASSES, WIDTH = 301, 17


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Cut heads into several chunks, the last one shorter."""
    monkeypatch.setattr(scratch, "CHUNK_ROWS", 40)
    monkeypatch.setattr(scratch, "LEAST_ELEMENTS", 1)


def given(labels: str = "all", dtype: torch.dtype = torch.float32, rows: int = 3, length: int = 7):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, length, WIDTH, generator=draw).to(dtype)
    w = torch.randn(CLASSES, WIDTH, generator=draw).to(dtype)
    y = torch.randint(0, CLASSES, (rows, length), generator=draw)
    if labels in ("some", "none"):
        y[:, :3] = -100
        y[1] = -100
    if labels == "none":
        y[:] = -100
    return x, w, y


@pytest.mark.parametrize("labels", ["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_logits(labels, dtype) -> None:
    x, w, y = given(labels, dtype)
    bias = torch.randn(CLASSES).to(dtype)
    for b in (None, bias):
        expected = sum_token_losses(nn.functional.linear(x, w) if b is None else nn.functional.linear(x, w) + b, y)
        assert torch.allclose(zo.head(x, w, b, None, None, y), expected, rtol=1e-5, atol=1e-5)


def test_labels_that_name_no_class_and_logits_that_are_not_finite_make_the_loss_not_finite() -> None:
    x, w, y = given()
    y[0, 0], y[1, 0] = CLASSES, -7
    x[2, 3] = torch.nan
    assert torch.isnan(zo.head(x, w, None, None, None, y)).tolist() == [True, True, True]
    x, w, y = given()
    x[0, 0] = torch.inf
    assert torch.isfinite(zo.head(x, w, None, None, None, y)).tolist() == [False, True, True]


def test_one_very_large_logit_is_no_overflow() -> None:
    x, w, y = given()
    expected = sum_token_losses(nn.functional.linear(1e4 * x, w), y)
    assert torch.allclose(zo.head(1e4 * x, w, None, None, None, y), expected, rtol=1e-5)


def test_labels_may_be_a_view_with_gaps() -> None:
    x, w, y = given(length=2)
    expected = sum_token_losses(nn.functional.linear(x[:, 1:], w), y[:, 1:])
    assert torch.allclose(zo.head(x[:, 1:], w, None, None, None, y[:, 1:]), expected, rtol=1e-5)


@pytest.mark.parametrize("bias", [None, (CLASSES,), (3, 1, CLASSES)], ids=["no bias", "one bias", "a bias of each row"])
@pytest.mark.parametrize("own", [False, True], ids=["shared factors", "factors of each row"])
@pytest.mark.parametrize("labels", ["all", "some"])
def test_low_rank_factors_join_the_logits(own, labels, bias) -> None:
    x, w, y = given(labels)
    thin = torch.randn(3, 7, 2)
    left = torch.randn(3, CLASSES, 2) if own else torch.randn(CLASSES, 2)
    bias = None if bias is None else torch.randn(bias)
    logits = nn.functional.linear(x, w) + thin @ left.mT + (0 if bias is None else bias)
    bias = bias if bias is None or bias.ndim == 1 else bias.squeeze(1)
    assert torch.allclose(zo.head(x, w, bias, thin, left, y), sum_token_losses(logits, y), rtol=1e-5, atol=1e-5)


def test_under_vmap_each_example_has_its_own_factors() -> None:
    x, w, y = given()
    thin, left = torch.randn(3, 7, 2), torch.randn(3, CLASSES, 2)

    def one(x: Tensor, thin: Tensor, left: Tensor, y: Tensor) -> Tensor:
        return zo.head(x.unsqueeze(0), w, None, thin.unsqueeze(0), left, y.unsqueeze(0)).reshape(())

    expected = sum_token_losses(nn.functional.linear(x, w) + thin @ left.mT, y)
    assert torch.allclose(torch.vmap(one)(x, thin, left, y), expected, rtol=1e-5)


@pytest.mark.parametrize("labels", ["all", "some"])
def test_a_perturbed_head_is_the_head_perturbed(labels) -> None:
    zm = zowrap.zo_wrap(make("llama"), "zo_sgd", engine="compiled")
    x, w, y = given(labels)
    noise = ([], torch.tensor([5, 6], dtype=torch.int32), torch.ones(()), [], torch.tensor([0.1, -0.1, 0.0]))
    kernel_key = zm.engine.kernels.key
    weights = zo.perturb(w, *noise, kernel_key)
    inputs, biases = [x, 2 * x, -x], [torch.randn(CLASSES) for _ in weights]
    expected = [sum_token_losses(nn.functional.linear(*each), y) for each in zip(inputs, weights, biases, strict=True)]
    got = zo.perturb_head(inputs, w, biases, *noise, y, kernel_key)
    assert torch.allclose(torch.stack(got), torch.stack(expected), rtol=1e-5)
    shared = zo.perturb_head([x], w, [], *noise, y, kernel_key)
    assert torch.allclose(shared[1], sum_token_losses(nn.functional.linear(x, weights[1]), y), rtol=1e-5)


def test_only_tokens_that_count_reach_the_head() -> None:
    _, _, y = given("some")
    tokens = fused._Tokens(y)
    assert tokens.of(torch.zeros(3, 7, WIDTH)).shape == (int((y != -100).sum()), WIDTH)


def captured(model: nn.Module, name: str = "llama", **options):
    zm = zowrap.zo_wrap(model, "zo_sgd", **options)
    program = capture(zm.job.loss, canonical_batch(batch(name, 4, 9), model))
    return run(program, [StripTraining(), FuseHead()])


@pytest.mark.parametrize("name", slow_except(["opt", "llama", "gpt2", "phi"], ["opt", "llama", "gpt2", "phi", "t5"]))
def test_heads_of_language_models_are_fused(name) -> None:
    program = captured(make(name), name)
    assert len(program.graph.find_nodes(op="call_function", target=zo.head.default)) == 1


class Capped(nn.Module):
    """A model with a soft cap between head and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(160, 8), nn.Linear(8, 160)

    def forward(self, ids: Tensor) -> Tensor:
        return 5 * torch.tanh(self.head(self.embed(ids)) / 5)


@pytest.mark.slow
def test_what_is_not_a_plain_head_is_written_out_and_computes_the_same() -> None:
    def loss_fn(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        sums, counts = token_losses(model(given["input_ids"]), given["labels"])
        return sums / counts

    losses = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        zm = zowrap.zo_wrap(Capped(), "zo_sgd", lr=0.1, engine=engine, loss_fn=loss_fn)
        given = {k: v for k, v in batch("llama", 3, 9).items() if k != "attention_mask"}
        losses.append(zm.step(**given).losses)
    assert torch.allclose(*losses, rtol=1e-6)
    assert "0 heads fused" in next(iter(zm.inspect().notes.values()))["fuse_head"]


def test_a_classifier_keeps_its_logits() -> None:
    program = captured(make("bert"), "bert")
    assert not program.graph.find_nodes(op="call_function", target=zo.head.default)


@pytest.mark.parametrize("rows", [1, 40, 1000, 5000])
@pytest.mark.parametrize("columns", [1, 7, 768, 1 << 23])
@pytest.mark.parametrize("tokens", [0, 3, 2048, 1 << 23])
def test_chunks_cover_every_row_once_in_runs_of_whole_cache_lines(rows, columns, tokens, monkeypatch) -> None:
    monkeypatch.undo()
    runs = list(scratch.chunks(rows, columns, tokens))
    assert [first for first, _ in runs] == [0, *[last for _, last in runs[:-1]]]
    assert runs[-1][1] == rows
    longest = max(last - first for first, last in runs)
    assert longest == scratch.longest(rows, columns, tokens)
    assert longest * max(columns, tokens) <= scratch.MOST_ELEMENTS or longest == 1
    aligned = longest % scratch.ROW_MULTIPLE == 0 or max(columns, tokens) * scratch.ROW_MULTIPLE > scratch.MOST_ELEMENTS
    assert len(runs) == 1 or aligned
