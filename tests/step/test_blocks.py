"""Blocks partition the parameters by layer, and every order is a pure function of (step, seed)."""

from __future__ import annotations

import pytest
import torch
import transformers

import zowrap
from tests.support.families import make
from zowrap.errors import ZOError
from zowrap.names import BLOCK_ORDERS
from zowrap.step.blocks import active, partition
from zowrap.step.parameters import select


def test_opt_125m_has_thirteen_blocks() -> None:
    import torch

    with torch.device("meta"):
        model = transformers.OPTForCausalLM(transformers.OPTConfig())
    model.tie_weights()
    parameters = select(model)
    blocks = partition(parameters, "layer")
    assert len(blocks) == 13
    assert sorted(i for b in blocks for i in b.indices) == list(range(len(parameters)))
    names = [parameters[i].name for i in blocks[-1].indices]
    assert any("decoder.final_layer_norm" in n for n in names)  # the final norm joins the last layer
    assert {parameters[i].name for i in blocks[0].indices} == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.embed_positions.weight",
    }


@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("qwen2", 4), ("gpt2", 3), ("t5", 5), ("bert", 5)])
def test_layers_are_found_by_structure(family: str, count: int) -> None:
    parameters = select(make(family))
    blocks = partition(parameters, "layer")
    assert sorted(i for b in blocks for i in b.indices) == list(range(len(parameters)))
    assert len(blocks) == count, [b.name for b in blocks]


def test_patterns_make_blocks_in_order() -> None:
    parameters = select(make("llama"))
    first, second = partition(parameters, ["*mlp*", "*self_attn*"])
    assert all("mlp" in parameters[i].name for i in first.indices)
    assert all("self_attn" in parameters[i].name for i in second.indices)
    with pytest.raises(ZOError, match="nosuch"):
        partition(parameters, ["nosuch"])


@pytest.mark.parametrize("order", BLOCK_ORDERS)
def test_orders_are_pure_and_visit_every_block(order: str) -> None:
    visited = [active(step, 5, order, seed=3) for step in range(400)]
    assert visited == [active(step, 5, order, seed=3) for step in range(400)]
    assert set(visited) == set(range(5))
    if order != "random":
        for sweep in range(80):
            assert sorted(visited[sweep * 5 : sweep * 5 + 5]) == list(range(5))
    if "random" in order:
        assert visited != [active(step, 5, order, seed=4) for step in range(400)]


def test_flip_flop_turns_round() -> None:
    assert [active(s, 3, "flip_flop", 0) for s in range(7)] == [0, 1, 2, 2, 1, 0, 0]


def test_only_the_active_block_moves_and_it_keeps_its_own_state() -> None:
    import torch

    model = make("llama")
    zm = zowrap.zo_wrap(model, "meazo", lr=1e-2, blocks="layer", engine="eager")
    for step in range(3):
        before = {p.name: p.tensor.clone() for p in zm.parameters}
        zm.update(projected_grad=torch.tensor(2.0))
        moved = {i for i, p in enumerate(zm.parameters) if not torch.equal(p.tensor, before[p.name])}
        assert moved == set(zm.job.blocks[step].indices)
        assert [float(s["n"]) for s in zm.job.states] == [1.0] * (step + 1) + [0.0] * (2 - step)


def test_an_order_of_no_blocks_is_refused() -> None:
    with pytest.raises(ZOError, match="block_order='random' does nothing without blocks"):
        zowrap.zo_wrap(make("llama"), block_order="random", engine="eager")


def test_unknown_order_names_the_nearest() -> None:
    with pytest.raises(ZOError, match="did you mean 'ascending'"):
        zowrap.zo_wrap(make("llama"), blocks="layer", block_order="asscending", engine="eager")


@pytest.mark.parametrize("options", [{"blocks": 3}, {"trainable": 3}, {"loss_fn": 3}, {"estimator": []}])
def test_options_of_the_wrong_type_are_named(options) -> None:
    (name,) = options
    with pytest.raises(ZOError, match=name):
        zowrap.zo_wrap(torch.nn.Linear(2, 2), "zo_sgd", **{"loss_fn": lambda m, b: m(b["x"]).sum(), **options})
