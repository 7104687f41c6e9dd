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
    "in turn": (3, lambda m, x, mask: (n := (mask == 0).sum().item()) > 0 and mask.sum().item() / n > 15),
    "item of floats": (2, lambda m, x, mask: x.abs().max().item() > 1.0),
    "not reached": (2, lambda m, x, mask: (mask == 0).any() and (x[(mask == 0).nonzero()[0, 0]] < 9).all()),
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


REFUSED: dict[str, tuple[str, Callable[[Branching, Tensor, Tensor], object]]] = {
    "weights": ("depends on its parameters", lambda m, x, mask: m.one.weight.sum() > 0),
    "buffer": ("depends on its buffers", lambda m, x, mask: mask.sum(-1).min() < m.most),
    "int": ("cannot capture", lambda m, x, mask: int(mask.sum(-1).min()) >= 5),
    "float": ("cannot capture", lambda m, x, mask: float(x.max()) >= 5),
    "size": ("as a size", lambda m, x, mask: (n := mask[0].sum().item()) > 3 and (torch.arange(n) + mask[0]).any()),
    "check": ("_check", lambda m, x, mask: _check((n := mask.sum(-1).min().item()) >= 5) or n > 5),
}


def _check(condition: bool) -> None:
    torch._check(condition)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_conditions_do_not_cover_is_refused(name: str) -> None:
    reason, asks = REFUSED[name]
    with pytest.raises(ZOCaptureError, match=reason):
        wrap(asks, "compiled").step(**batch_of(4, 0))


def test_a_number_that_nothing_asks_about_is_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It scales the output, and serves every batch."""
    compile_nothing(monkeypatch)

    def forward(self: Branching, x: Tensor, mask: Tensor, plain: Callable[..., Tensor] = Branching.forward) -> Tensor:
        return plain(self, x, mask) * mask.sum().item()

    monkeypatch.setattr(Branching, "forward", forward)
    eager, compiled = wrap(ASKS["any"][1], "eager"), wrap(ASKS["any"][1], "compiled")
    for rows, zeros in ((4, 0), (5, 0), (4, 1), (4, 2)):
        given = batch_of(rows, zeros)
        assert torch.allclose(eager.step(**given).losses, compiled.step(**given).losses)
    assert len(compiled.engine.executables) == 2


def test_a_batch_of_nan_takes_the_way_that_python_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    zm = wrap(ASKS["item of floats"][1], "compiled")
    zm.step(**batch_of(4, 0))
    given = batch_of(4, 0)
    given["x"] = given["x"] * float("nan")
    assert zm.step(**given).skipped.all()
    assert not zm.step(**batch_of(4, 1)).skipped.any()
    assert len(zm.engine.executables) == 2


def test_a_single_row_first_leaves_the_other_way_open(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    zm = wrap(ASKS["any"][1], "compiled")
    for rows, zeros in ((4, 0), (1, 1), (5, 1), (3, 1)):
        zm.step(**batch_of(rows, zeros))
    assert len(zm.engine.executables) == 2


def test_costs_are_counted_without_values() -> None:
    """They are counted on the meta device, for any of the ways."""
    zm = wrap(ASKS["any"][1], "compiled")
    zm.step(**batch_of(8, 0))
    assert zm.inspect().costs is not None
