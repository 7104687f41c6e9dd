"""Repeated layers are compiled once, blocks share what they can, and cutting changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zowrap
from zowrap.telling import Telling

LAYERS = 5


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).reshape(rows, length) % 61 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trajectory(engine: str, steps: int = 3, **options) -> tuple[zowrap.model.ZOModel, list[torch.Tensor]]:
    zm = zowrap.zo_wrap(make(), "zo_sgd", lr=1e-3, eps=1e-2, engine=engine, **options)
    losses = [zm.step(**batch(2 + i % 2, 5 + i)).losses for i in range(steps)]
    return zm, losses


def test_layers_are_compiled_once_and_blocks_share_them() -> None:
    zm, losses = trajectory("compiled", steps=2 * (LAYERS + 2), blocks="layer")
    _, expected = trajectory("eager", steps=2 * (LAYERS + 2), blocks="layer")
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-5)
    executables = list(zm._engine.executables.values())
    assert len(executables) == LAYERS + 2 and all(e.compiled.count == LAYERS + 2 for e in executables)
    per_program = [e.compiled.compilations for e in executables]
    total = zm.inspect().compile_count
    assert total == sum(per_program) <= 3 * per_program[0]
    # A block in the middle needs at most a layer below, itself and a layer above; the second of them nothing new.
    assert per_program[3:LAYERS] == [0] * (LAYERS - 3)


def test_a_whole_model_is_three_kinds_of_regions() -> None:
    zm, _ = trajectory("compiled", steps=1)
    (executable,) = zm._engine.executables.values()
    assert executable.compiled.count == LAYERS + 2 and zm.inspect().compile_count <= 4


def test_the_parts_are_counted_before_each_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Telling, "region", lambda self, number, count: told.append((number, count)))
    zm, _ = trajectory("compiled", steps=2)
    assert len(told) == zm.inspect().compile_count
    assert told == [(i + 1, len(told)) for i in range(len(told))]


def test_values_live_no_longer_than_their_last_reader() -> None:
    zm, _ = trajectory("compiled", steps=1)
    (executable,) = zm._engine.executables.values()
    alive: set[int] = set()
    for _, _, results, last_used in executable.compiled.calls:
        alive = (alive | set(results)) - set(last_used)
    assert len(alive) == len(executable.compiled.outputs) == 3  # two losses and the weights


def test_few_layers_are_one_region() -> None:
    config = make().config
    config.num_hidden_layers = 2
    zm = zowrap.zo_wrap(LlamaForCausalLM(config).eval(), "zo_sgd", lr=1e-3, engine="compiled")
    zm.step(**batch(2, 5))
    assert zm.inspect().compile_count == 1
