"""Experts that are modules of their own are captured, and a forward may convert a module's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import zowrap
from tests.support.uncompiled import compile_nothing
from zowrap.compiler.experts import capture_experts, expert_products


def make() -> Any:
    """An encoder and a decoder of one layer each, whose experts take three tokens of a row."""
    torch.manual_seed(0)
    config = T.SwitchTransformersConfig(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_experts=4, expert_capacity=3, num_layers=1,
        num_decoder_layers=1, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return T.SwitchTransformersForConditionalGeneration(config).eval()


def batch(rows: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(length)
    return {
        "input_ids": torch.randint(5, 60, (rows, length), generator=draw),
        "labels": torch.randint(5, 60, (rows, length // 2), generator=draw),
    }


@pytest.mark.slow
def test_switch_transformers_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, node by node; tokens beyond the capacity pass no expert."""
    compile_nothing(monkeypatch)
    eager, compiled = (zowrap.zo_wrap(make(), "zo_sgd", lr=1e-2, eps=0.1, engine=e) for e in ("eager", "compiled"))
    for rows, length in ((3, 12), (2, 20), (1, 8)):
        inputs = batch(rows, length)
        losses = [zm.step(**inputs).losses for zm in (eager, compiled)]
        assert torch.allclose(*losses, rtol=1e-5), (rows, length)
    assert len(compiled.engine.executables) == 1
    layers = [m for m in compiled.model.modules() if "forward" in vars(m)]
    assert not layers and all(type(p) is nn.Parameter for p in compiled.model.parameters())


def test_rows_are_multiplied_with_the_weights_of_their_experts() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(7, 3, generator=draw), list(torch.randn(4, 2, 3, generator=draw).unbind())
    experts = torch.tensor([2, 0, 2, 3, 0, 0, 2])  # the second gets none
    each = [weights[e] @ row for e, row in zip(experts.tolist(), x, strict=True)]
    assert torch.allclose(expert_products(x, weights, experts), torch.stack(each), atol=1e-6)
    assert expert_products(x[:0], weights, experts[:0]).shape == (0, 2)


def test_experts_with_more_than_a_weight_are_left_alone() -> None:
    """Adapters, for example, whose part of the result would be lost."""
    model = make()
    first, second = (block.layer[-1].mlp.experts for block in (model.encoder.block[0], model.decoder.block[0]))
    second.expert_1.wi = nn.Sequential(second.expert_1.wi)
    with capture_experts(model):
        assert "forward" in vars(first) and "forward" not in vars(second)
    assert "forward" not in vars(first)


def test_a_converted_module_gets_its_own_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Router(nn.Module):
        """In bfloat16, with a layer that its forward converts to float32."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            self.layer = self.layer.to(torch.float32)
            return self.layer(x)

    compile_nothing(monkeypatch)
    inputs, plain = {"x": torch.randn(3, 4)}, nn.Module._apply
    options: dict[str, Any] = {"eps": 0.1, "loss_fn": lambda model, given: model(given["x"]).square().mean(1)}
    models = [Router(), Router()]
    zms = [zowrap.zo_wrap(m, "zo_sgd", engine=e, **options) for m, e in zip(models, ("eager", "compiled"), strict=True)]
    before = [*models[1].parameters()]
    assert torch.allclose(*[zm.step(**inputs).losses for zm in zms], rtol=1e-5)
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(models[1].parameters(), before, strict=True))
    assert nn.Module._apply is plain
