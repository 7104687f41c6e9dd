"""Repeated layers are compiled once, blocks share what they can, and cutting changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zowrap
import zowrap.model.zo_model
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


def trajectory(engine: str, steps: int = 3, **options) -> tuple[zowrap.model.zo_model.ZOModel, list[torch.Tensor]]:
    zm = zowrap.zo_wrap(make(), "zo_sgd", lr=1e-3, eps=1e-2, engine=engine, **options)
    losses = [zm.step(**batch(2 + i % 2, 5 + i)).losses for i in range(steps)]
    return zm, losses


def test_layers_are_compiled_once_and_blocks_share_them() -> None:
    zm, losses = trajectory("compiled", steps=2 * (LAYERS + 2), blocks="layer")
    _, expected = trajectory("eager", steps=2 * (LAYERS + 2), blocks="layer")
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-5)
    executables = list(zm.engine.executables.values())
    assert len(executables) == LAYERS + 2 and all(e.compiled.count == LAYERS + 2 for e in executables)
    per_program = [e.compiled.compilations for e in executables]
    total = zm.inspect().compile_count
    assert total == sum(per_program) <= 3 * per_program[0]
    # A block in the middle needs at most a layer below, itself and a layer above; the second of them nothing new.
    assert per_program[3:LAYERS] == [0] * (LAYERS - 3)


def test_a_whole_model_is_three_kinds_of_regions() -> None:
    zm, _ = trajectory("compiled", steps=1)
    (executable,) = zm.engine.executables.values()
    assert executable.compiled.count == LAYERS + 2 and zm.inspect().compile_count <= 4


def test_the_parts_are_counted_before_each_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Telling, "region", lambda self, number, count: told.append((number, count)))
    zm, _ = trajectory("compiled", steps=2)
    assert len(told) == zm.inspect().compile_count
    assert told == [(i + 1, len(told)) for i in range(len(told))]


def test_values_live_no_longer_than_their_last_reader() -> None:
    zm, _ = trajectory("compiled", steps=1)
    (executable,) = zm.engine.executables.values()
    alive: set[int] = set()
    for call in executable.compiled.calls:
        alive = (alive | set(call.results)) - set(call.last_used)
    assert len(alive) == len(executable.compiled.outputs) == 3  # two losses and the weights


def test_few_layers_are_one_region() -> None:
    config = make().config
    config.num_hidden_layers = 2
    zm = zowrap.zo_wrap(LlamaForCausalLM(config).eval(), "zo_sgd", lr=1e-3, engine="compiled")
    zm.step(**batch(2, 5))
    assert zm.inspect().compile_count == 1


def regions_run(zm: zowrap.model.zo_model.ZOModel, monkeypatch: pytest.MonkeyPatch, **given: torch.Tensor) -> list[int]:
    """How many shared calls and others a step makes, counted for each direction."""
    from zowrap.compiler.regions import Regions

    counts: list[int] = []
    whole = Regions.__call__

    def counting(self, *inputs, kept=None):
        skipped = len(self.shared) if kept else 0
        counts.append(len(self.calls) - skipped)
        return whole(self, *inputs, kept=kept)

    monkeypatch.setattr(Regions, "__call__", counting)
    zm.step(**given)
    return counts


@pytest.mark.parametrize("moving", [["*layers.4.mlp.down_proj*"], ["*layers.4*", "*norm*"]])
@pytest.mark.parametrize("memory", ["paired", "sequential"])
def test_what_no_direction_reaches_is_computed_once_and_changes_nothing(
    moving: list[str], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"trainable": moving, "queries": 3, "memory": memory}
    zm, losses = trajectory("compiled", **options)
    _, expected = trajectory("eager", **options)
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-5)
    alone = zowrap.zo_wrap(make(), "zo_sgd", lr=1e-3, eps=1e-2, engine="compiled", **options)
    whole = type(alone.engine).losses

    def unshared(self, *given):  # as if every direction were the first
        if self._kept is not None:
            self._kept.clear()
        return whole(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(type(alone.engine), "losses", unshared)
        again = [alone.step(**batch(2 + i % 2, 5 + i)).losses for i in range(3)]
    assert all(one.equal(other) for one, other in zip(losses, again, strict=True))  # bit for bit
    counts = regions_run(zm, monkeypatch, **batch(2, 5))
    assert len(counts) == (6 if memory == "sequential" else 3)
    assert all(count < counts[0] for count in counts[1:])


def test_the_next_batch_and_the_moved_weights_share_nothing_with_the_last() -> None:
    options = {"trainable": ["*layers.4.mlp.down_proj*"], "queries": 2}
    zm, _ = trajectory("compiled", **options)
    before = zm.loss(**batch(2, 5))
    with torch.no_grad():
        zm.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # below everything that moves
    eager = zowrap.zo_wrap(zm.model, "zo_sgd", lr=1e-3, eps=1e-2, engine="eager", **options)
    zm.accumulate(**batch(2, 5))
    eager.step_count = zm.step_count
    eager.accumulate(**batch(2, 5))
    assert torch.allclose(zm.peek()[0], eager.peek()[0], rtol=1e-5)
    assert not torch.allclose(zm.loss(**batch(2, 5)), before)
