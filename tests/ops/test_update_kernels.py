"""The update of many directions, which sums them up in groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.slow import slow_except
from zowrap import rules
from zowrap.ops import update_kernels

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, decay, sphere": {
        "rule": rules.zo_sgd(momentum=0.9),
        "weight_decay": 0.1,
        "direction": "sphere",
        "dtype": torch.bfloat16,
    },
    "as evaluated": {"along": "evaluated", "dtype": torch.bfloat16},
    "masters": {"masters": True, "dtype": torch.bfloat16},
    "a shaped direction": {"rule": "sparse_mezo"},
}


def train(name: str, queries: int) -> tuple[list[Tensor], Any]:
    """Two steps of a tiny model; returns its weights and state, and the kernels."""
    options = {"rule": "zo_sgd", "lr": 1e-2, **OPTIONS[name]}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(options.pop("dtype", torch.float32))
    zm = zowrap.zo_wrap(
        model, engine="compiled", queries=queries, loss_fn=lambda m, b: m(b["x"]).float().square().mean(-1), **options
    )
    for _ in range(2):
        zm.step(x=torch.ones(4, 5, dtype=zm.parameters[0].tensor.dtype))
    slots = [slot for each in zm.job.slots.values() for slot in each if slot is not None]
    return [p.tensor.detach().clone() for p in zm.parameters] + slots, zm.engine.kernels


@pytest.mark.parametrize("name", slow_except(["plain"], OPTIONS))
def test_groups_have_the_bits_of_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, kernels = train(name, queries=5)
    assert not kernels.update.in_groups(5)
    monkeypatch.setattr(update_kernels, "MOST_DIRECTIONS", 2)  # two, two and one
    monkeypatch.setattr(update_kernels, "MOST_ELEMENTS", 16)  # of 35 elements: two chunks and a rest
    kernels.loops._compiled.clear()  # equal runs share their kernels
    grouped, kernels = train(name, queries=5)
    assert any(key[0] == "add" for key in kernels.loops._compiled)
    for one, other in zip(whole, grouped, strict=True):
        assert one.dtype == other.dtype and one.equal(other)


def test_what_a_group_is_summed_up_in_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_kernels, "MOST_DIRECTIONS", 2)
    _, kernels = train("plain", queries=2)
    assert kernels.update.persistent_buffers(35, 2) == {}
    assert kernels.update.persistent_buffers(35, 3) == {("gradient", torch.float32, 1): 4 * 35}
    assert kernels.update.persistent_buffers(1 << 30, 3) == {
        ("gradient", torch.float32, 1): 4 * update_kernels.MOST_ELEMENTS
    }
