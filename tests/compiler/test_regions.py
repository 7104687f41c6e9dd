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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_parts_are_counted_before_each_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(Telling, "region", lambda self, number, count: told.append((number, count)))
    zm, _ = trajectory("compiled", steps=2)
    assert len(told) == zm.inspect().compile_count
    assert told == [(i + 1, len(told)) for i in range(len(told))]


class Masked(torch.nn.Module):
    """Its layers read a view of an input, which is taken out of the first region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask, hidden = mask.view(len(mask), 1), self.first(x)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)) * mask
        return hidden.sum(-1)


def test_a_region_without_the_views_that_it_returned_is_counted_as_before() -> None:
    given = {"x": torch.ones(3, 4), "mask": torch.rand(3)}
    one, other = (
        zowrap.zo_wrap(Masked(), "zo_sgd", eps=1e-2, engine=engine, loss_fn=lambda m, b: m(b["x"], b["mask"]))
        for engine in ("compiled", "eager")
    )
    assert torch.allclose(one.step(**given).losses, other.step(**given).losses, rtol=1e-5)


@pytest.mark.slow
def test_values_live_no_longer_than_their_last_reader() -> None:
    zm, _ = trajectory("compiled", steps=1)
    (executable,) = zm.engine.executables.values()
    alive: set[int] = set()
    for call in executable.compiled.calls:
        alive = (alive | set(call.results)) - set(call.last_used)
    assert len(alive) == len(executable.compiled.outputs) == 3  # two losses and the weights


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


class Sliced(torch.nn.Module):
    """Layers over all positions but the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.head = torch.nn.Linear(8, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def next_token_loss(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(given["ids"][:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["ids"][:, 1:].flatten())


@pytest.mark.slow
def test_a_length_that_is_computed_crosses_the_border_of_a_region() -> None:
    """No region but the first has an input of length n, of which n − 1 is computed."""
    options = {"loss_fn": next_token_loss, "blocks": "layer", "block_order": "descending", "eps": 1e-2}
    eager, compiled = (zowrap.zo_wrap(Sliced(), "zo_sgd", engine=engine, **options) for engine in ("eager", "compiled"))
    for rows, length in [(4, 9), (2, 2)]:
        ids = torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(rows))
        for zm in (eager, compiled):
            zm.discard()
            zm.accumulate(ids=ids)
        assert torch.allclose(eager.peek()[0], compiled.peek()[0], rtol=1e-5)


@pytest.mark.slow
def test_a_region_of_views_returns_those_of_the_right_inputs() -> None:
    """A head behind a pooling: its views have a size among their inputs."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    state = transformers.ResNetForImageClassification(config).state_dict()
    losses = []
    for engine in ("eager", "compiled"):
        model = transformers.ResNetForImageClassification(config)
        model.load_state_dict(state)
        zm = zowrap.zo_wrap(model, "zo_sgd", engine=engine, eps=1e-2)
        draw = torch.Generator().manual_seed(0)
        zm.accumulate(pixel_values=torch.randn(4, 3, 32, 32, generator=draw), labels=torch.tensor([0, 1, 2, 0]))
        losses.append(zm.peek()[0])
    assert torch.allclose(*losses, rtol=1e-5)


def test_what_is_only_a_view_of_an_input_is_no_output_of_a_region() -> None:
    from zowrap.compiler.regions import _region, _take_views_out

    graph = torch.fx.Graph()
    x, size = graph.placeholder("x"), graph.placeholder("size")
    view = graph.call_function(torch.ops.aten.view.default, (x, [size, 8]))
    first = graph.call_function(torch.ops.aten.select.int, (view, 0, 0))
    total = graph.call_function(torch.ops.aten.relu.default, (view,))
    shaped = graph.call_function(torch.ops.aten.reshape.default, (x, [8, size]))  # which may copy
    graph.output((first, total, shaped))
    region = _region([view, first, total, shaped])
    assert _take_views_out(region) == [view, first]
    assert region.outputs == [total, shaped] and region.nodes == [view, total, shaped]


def test_two_inputs_that_are_traced_as_one_tensor_stay_two() -> None:
    from types import SimpleNamespace

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from zowrap.compiler.regions import _compile, _region

    mode = FakeTensorMode(shape_env=ShapeEnv())
    same = mode.from_tensor(torch.ones(4))
    graph = torch.fx.Graph()
    first, second = (graph.placeholder(name) for name in ("first", "second"))
    for given in (first, second):
        given.meta["val"] = same
    made = [graph.call_function(torch.ops.aten.to.dtype, (given, torch.float32)) for given in (first, second)]
    graph.output(tuple(made))
    kind = _compile(SimpleNamespace(fake_mode=mode), _region(made))
    one, two = kind.compiled(torch.ones(4), torch.full((4,), 2.0))
    assert one.tolist() == [1.0] * 4 and two.tolist() == [2.0] * 4
