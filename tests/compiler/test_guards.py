"""A model that does something else at other sizes is captured again there, and never runs another size's program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
import zowrap.errors
from tests.support.uncompiled import compile_nothing
from zowrap.model.zo_model import ZOModel


class Branching(nn.Module):
    """Embeddings whose treatment depends on the sizes of ``ids``, int64 ``[rows, length]``."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.what = nn.Embedding(20, 8), nn.Linear(8, 3), what

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.what(self.table(ids).tanh()).mean(1))


WHATS: dict[str, Callable[[Tensor], Tensor]] = {
    "length": lambda h: h[:, -32:] * 2.0 if h.shape[1] > 32 else h,
    "rows": lambda h: h * 3.0 if h.shape[0] >= 4 else h,
    "one row": lambda h: h * 3.0 if h.shape[0] == 1 else h,
    "both": lambda h: h * 3.0 if h.shape[0] == h.shape[1] else h,
}


def wrap(what: str, engine: str) -> ZOModel:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]), batch["labels"], reduction="none")

    return zowrap.zo_wrap(Branching(WHATS[what]), "zo_sgd", lr=1e-3, eps=0.1, loss_fn=loss, engine=engine)


def rows_of(rows: int, length: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(20, (rows, length), generator=draw)
    return {"ids": ids, "labels": ids[:, 0] % 3}


@pytest.mark.parametrize("what", WHATS)
def test_each_size_takes_the_way_that_python_takes(what: str) -> None:
    eager, compiled = wrap(what, "eager"), wrap(what, "compiled")
    for rows, length in ((8, 48), (2, 20), (4, 20), (1, 40), (6, 6), (2, 33), (5, 7), (2, 20)):
        inputs = rows_of(rows, length)
        one, other = eager.step(**inputs).losses, compiled.step(**inputs).losses
        assert torch.allclose(one, other, atol=1e-5), (rows, length)
    assert 2 <= len(compiled.engine.executables) <= 4


def test_sizes_that_nothing_was_asked_of_share_a_program() -> None:
    zm = wrap("length", "compiled")
    for rows, length in ((2, 5), (7, 9), (1, 32), (30, 2)):
        zm.loss(**rows_of(rows, length))
    assert len(zm.engine.executables) == 1


def test_a_program_for_one_size_that_would_be_too_long_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from zowrap.engines import captures

    monkeypatch.setattr(captures, "MAX_OWN_NODES", 5)
    zm = wrap("length", "compiled")
    zm.loss(**rows_of(4, 40))  # on the way that the canonical batch took
    with pytest.raises(zowrap.errors.ZOCaptureError, match=r"for this size alone would have \d+ operations"):
        zm.loss(**rows_of(4, 20))


class Windows(nn.Module):
    """Cuts pictures into windows of eight by eight pixels, here one for each picture, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, high, wide = x.shape
        parts = x.permute(0, 2, 3, 1).contiguous().view(rows, high // 8, 8, wide // 8, 8, 3)
        h = self.layer(parts.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 64, 3)).tanh()
        return nn.functional.adaptive_avg_pool1d(h.transpose(1, 2), 1).flatten(1).view(rows, -1).square().mean(1)


def test_a_single_row_shares_the_program_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernels ask whether there is one, but no result depends on it."""
    compile_nothing(monkeypatch)
    zms = [
        zowrap.zo_wrap(Windows(), "zo_sgd", eps=0.1, loss_fn=lambda m, b: m(b["x"]), engine=engine)
        for engine in ("eager", "compiled")
    ]
    for rows in (3, 1, 2):
        inputs = {"x": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))}
        assert torch.allclose(*[zm.step(**inputs).losses for zm in zms], rtol=1e-5), rows
    (programs,) = zms[1].engine.captures.by_kind.values()
    assert len(programs) == 1


@pytest.mark.parametrize("squeeze", [lambda h: h.squeeze(), lambda h: torch.squeeze(h, dim=0)], ids=["all", "first"])
def test_a_dimension_that_squeezing_drops_is_asked_about(squeeze: Callable[[Tensor], Tensor]) -> None:
    """Of a single row the first dimension is gone, and the sum another one."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    zms = [
        zowrap.zo_wrap(model, "zo_sgd", loss_fn=lambda m, b: squeeze(m(b["x"])).cumsum(0).flatten()[-1:], engine=engine)
        for engine in ("eager", "compiled")
    ]
    for rows in (3, 1, 2):
        inputs = {"x": torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))}
        assert torch.allclose(*[zm.loss(**inputs) for zm in zms], rtol=1e-5), rows
    assert len(zms[1].engine.executables) == 2
    assert torch.Tensor.squeeze(torch.ones(1, 2)).ndim == 1 and torch.squeeze.__module__ != "zowrap.compiler.guards"


class Number(nn.Module):
    """Divides by a number read out of a tensor: of its own output, of a weight, or of the batch."""

    def __init__(self, of: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.of = nn.Linear(5, 4), nn.Linear(4, 3), of

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        source = {"output": h, "weight": self.first.weight, "batch": x}[self.of]
        return self.second(h / source.abs().max().item())


@pytest.mark.parametrize("of", ["output", "weight", "batch"])
def test_a_number_that_each_point_has_another_one_of_is_not_taken_from_the_first(of: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean(1)

    inputs = {"x": torch.randn(6, 5, generator=torch.Generator().manual_seed(1))}
    made = [zowrap.zo_wrap(Number(of), "zo_sgd", lr=1e-3, eps=0.3, loss_fn=loss, engine=e) for e in ("eager", None)]
    if of == "batch":
        losses = [zm.step(**inputs).losses for zm in made]
    else:
        with pytest.warns(zowrap.errors.ZOWarning, match=r"turns a tensor .* into a Python number .*\.item"):
            losses = [zm.step(**inputs).losses for zm in made]
    assert torch.allclose(*losses, rtol=1e-5)
    assert made[1].inspect().engine == ("compiled" if of == "batch" else "eager")


class Chooses(nn.Module):
    """Keeps a choice of values in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (self.linear(x),))


def test_what_passes_cannot_rewrite_runs_eagerly() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean(1)

    zm = zowrap.zo_wrap(Chooses(), "zo_sgd", lr=1e-3, loss_fn=loss)
    with pytest.warns(zowrap.errors.ZOWarning, match="running eagerly, because the model contains a subgraph"):
        zm.step(x=torch.ones(6, 5))
    assert zm.step_count == 1


def test_what_the_compiler_fails_at_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from zowrap.engines import compiled

    def fails(*args: Any, **options: Any) -> Any:
        raise KeyError("val")

    monkeypatch.setattr(compiled, "compile_regions", fails)
    zm = zowrap.zo_wrap(Branching(lambda h: h), "zo_sgd", lr=1e-3, loss_fn=lambda m, b: m(b["ids"]).square().mean(1))
    with pytest.warns(zowrap.errors.ZOWarning, match="this model cannot be compiled .KeyError"):
        zm.step(ids=torch.ones(3, 4, dtype=torch.int64))
    assert zm.step_count == 1
