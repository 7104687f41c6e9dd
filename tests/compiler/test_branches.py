"""A model that branches on values of its batch is captured once for each way, and never runs another way's program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.uncompiled import compile_nothing
from zowrap.errors import ZOCaptureError
from zowrap.model.zo_model import ZOModel


class Branching(nn.Module):
    """A layer, and another one for the batches that ``asks`` says yes to. ``mask`` is int64 ``[rows, length]``."""

    def __init__(self, asks: Callable[[Branching, Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other, self.asks = nn.Linear(4, 3), nn.Linear(4, 3), asks
        self.register_buffer("most", torch.tensor(5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.other(x) if self.asks(self, x, mask) else self.one(x)


# By the number of programs that masks of zero to two zeros in rows of 6 need.
ASKS: dict[str, tuple[int, Callable[[Branching, Tensor, Tensor], object]]] = {
    "any": (2, lambda m, x, mask: (mask == 0).any()),
    "item": (2, lambda m, x, mask: mask.all().item()),
    "not": (2, lambda m, x, mask: not mask.all()),
    "length": (2, lambda m, x, mask: mask.sum(-1).min().item() < mask.shape[1]),
    "int": (3, lambda m, x, mask: int(mask.sum(-1).min()) >= 5),  # each value has its own
    "float": (2, lambda m, x, mask: x.abs().max().item() > 1.0),
    "buffer": (2, lambda m, x, mask: mask.sum(-1).min() < m.most),
    "two": (3, lambda m, x, mask: mask.sum(-1).min().item() < 5 or bool((mask == 0).any())),
    "always": (1, lambda m, x, mask: mask.sum(-1).max().item() <= mask.shape[1]),
}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"], batch["mask"]).square().mean(-1)


def wrap(asks: Callable[[Branching, Tensor, Tensor], object], engine: str) -> ZOModel:
    return zowrap.zo_wrap(Branching(asks), "zo_sgd", lr=1e-2, eps=0.1, loss_fn=loss, engine=engine)


def batch_of(rows: int, zeros: int) -> dict[str, Tensor]:
    """``zeros`` of them in the first row of the mask; with any, no number of ``x`` is above 1."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    mask = torch.ones(rows, 6, dtype=torch.int64)
    mask[0, :zeros] = 0
    return {"x": x.clamp(-1, 1) if zeros else x * 3, "mask": mask}


@pytest.mark.parametrize("name", ASKS)
def test_each_batch_takes_the_way_that_python_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    programs, asks = ASKS[name]
    eager, compiled = wrap(asks, "eager"), wrap(asks, "compiled")
    for rows, zeros in ((8, 0), (8, 1), (5, 0), (5, 2), (3, 1), (3, 0), (2, 2)):
        given = batch_of(rows, zeros)
        one, other = eager.step(**given).losses, compiled.step(**given).losses
        assert torch.allclose(one, other, rtol=1e-5), (rows, zeros)
    assert compiled.engine.fallen_back is None
    assert len(compiled.engine.executables) == programs


def test_a_branch_on_weights_is_refused() -> None:
    zm = wrap(lambda m, x, mask: m.one.weight.sum() > 0, "compiled")
    with pytest.raises(ZOCaptureError, match="branches on a number that depends on its weights"):
        zm.step(**batch_of(4, 0))


def test_costs_are_counted_without_values() -> None:
    """They are counted on the meta device, for any of the ways."""
    zm = wrap(ASKS["any"][1], "compiled")
    zm.step(**batch_of(8, 0))
    assert zm.inspect().costs is not None


def test_the_program_itself_takes_no_number() -> None:
    zm = wrap(ASKS["two"][1], "compiled")
    program = zm.engine.captured(batch_of(8, 1))
    assert "item" not in program.history[0][1] and "_local_scalar_dense" not in program.history[0][1]
