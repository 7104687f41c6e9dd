"""Steps with residual credit in machine code: both schedules are the eager engine's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.engines.test_residual import RULES, farthest, quantized, tune, weights, wrap
from tests.support.families import batch
from tests.support.slow import slow_except


@pytest.mark.parametrize("rule", slow_except(("meazo",), RULES))
def test_the_engines_agree(rule: str) -> None:
    eager, fast = wrap(engine="eager", rule=rule), wrap(rule=rule)
    before = weights(fast)
    for mine, theirs in zip(tune(eager), tune(fast), strict=True):
        assert torch.allclose(mine.loss, theirs.loss, rtol=1e-5)
        assert torch.allclose(mine.projected_grad, theirs.projected_grad, rtol=1e-4)
    assert farthest(eager, fast) < 1e-5
    moved = {name for name, tensor in weights(fast).items() if not torch.equal(tensor, before[name])}
    assert moved and all("c_proj" in name for name in moved)


def test_the_schedules_agree() -> None:
    paired, sequential = wrap(memory="paired"), wrap(memory="sequential")
    tune(paired), tune(sequential)
    assert farthest(paired, sequential) < 1e-6


@pytest.mark.parametrize("memory", slow_except(("sequential",), ("paired", "sequential")))
def test_micro_batches_make_the_step_of_their_union(memory: str) -> None:
    whole, parts = wrap(engine="eager"), wrap(memory=memory)
    given = batch("gpt2", 4, 9)
    whole.step(**given)
    for rows in (slice(0, 1), slice(1, 4)):
        parts.accumulate(**{name: value[rows] for name, value in given.items()})
    parts.update()
    assert farthest(whole, parts) < 1e-6


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    for memory in ("paired", "sequential"):
        zm = wrap(memory=memory)
        with torch.no_grad():
            zm.model.transformer.ln_f.weight[0] = torch.nan
        before = weights(zm)
        result = zm.step(**batch("gpt2", 3, 9))
        assert result.skipped and zm.step_count == 1
        assert all(torch.equal(before[n].nan_to_num(), t.nan_to_num()) for n, t in weights(zm).items())


class Deep(nn.Module):
    """Six blocks, so that they are compiled one by one, and share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 6) for _ in range(6)])
        self.own = nn.ModuleList([nn.Linear(6, 4) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, own in zip(self.layers, self.own, strict=True):
            inner = layer(x).tanh()
            x = x + own(inner) + self.shared(inner)
        return x


def test_a_matrix_is_written_after_its_last_use() -> None:
    zms = []
    for engine, memory in (("eager", "auto"), ("compiled", "paired"), ("compiled", "sequential")):
        torch.manual_seed(0)
        zms.append(
            zowrap.zo_wrap(
                Deep(),
                "zo_sgd",
                loss_fn=lambda model, given: model(given["x"]).square().mean(-1),
                estimator="residual",
                engine=engine,
                memory=memory,
                lr=0.1,
            )
        )
        for seed in range(3):
            zms[-1].step(x=torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
    assert farthest(zms[0], zms[1]) < 1e-6 and farthest(zms[0], zms[2]) < 1e-6


@pytest.mark.parametrize(
    ("scheme", "adapters", "moved"),
    [
        ("int8", False, ("o_proj.log_scale", "down_proj.log_scale")),
        pytest.param(
            *("int8 with outliers", False, ("o_proj.log_scale", "down_proj.log_scale")), marks=pytest.mark.slow
        ),
        pytest.param("int8", True, ("o_proj.lora_B", "down_proj.lora_B"), marks=pytest.mark.slow),
        pytest.param("nf4", True, ("o_proj.lora_B", "down_proj.lora_B"), marks=pytest.mark.slow),
    ],
)
def test_scales_and_adapters_of_quantised_weights_move(scheme: str, adapters: bool, moved: tuple[str, ...]) -> None:
    zms = [quantized(scheme, engine, adapters) for engine in ("eager", "compiled")]
    given = batch("llama", 3, 9)
    names = {p.name for p in zms[0].parameters}
    before = {p.name: p.tensor.clone() for p in zms[0].parameters}
    losses = [float(zms[0].loss(**given))]
    for _ in range(12):
        for zm in zms:
            zm.step(**given)
    losses.append(float(zms[0].loss(**given)))
    assert losses[1] < losses[0] - 0.02
    changed = {p.name for p in zms[0].parameters if not torch.equal(p.tensor, before[p.name])}
    assert changed == {name for name in names if any(end in name for end in moved)}
    for mine, theirs in zip(zms[0].parameters, zms[1].parameters, strict=True):
        assert torch.allclose(mine.tensor, theirs.tensor, atol=1e-4), mine.name


class Kept(nn.Module):
    """Later blocks read what earlier ones wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        every = []
        for layer in self.layers:
            x = x + layer(x.tanh())
            every.append(x)
        return sum(each.tanh() for each in every)  # type: ignore[return-value]


@pytest.mark.slow
def test_an_input_that_is_read_again_stays() -> None:
    zms = []
    for memory in ("paired", "sequential"):
        torch.manual_seed(0)
        loss = lambda model, given: model(given["x"]).square().mean(-1)  # noqa: E731
        options = {"loss_fn": loss, "estimator": "residual", "engine": "compiled", "memory": memory, "lr": 0.05}
        zms.append(zowrap.zo_wrap(Kept(), "zo_sgd", **options))
        for seed in range(3):
            zms[-1].step(x=torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
    assert farthest(*zms) < 1e-6


@pytest.mark.slow
def test_an_engine_that_falls_back_in_the_middle_of_a_step_finishes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from zowrap.engines import compiled

    real, calls = compiled.compile_regions, []

    def fails_later(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("val")
        return real(*args, **options)

    monkeypatch.setattr(compiled, "compile_regions", fails_later)
    fallen, eager = wrap(engine=None, memory="sequential"), wrap(engine="eager")
    one, other = batch("gpt2", 3, 9), batch("gpt2", 3, 9, seed=1)
    del other["attention_mask"]  # another kind of batch, whose program does not compile
    for zm in (fallen, eager):
        zm.accumulate(**one)
        if zm is fallen:
            with pytest.warns(UserWarning, match="running eagerly"):
                zm.accumulate(**other)
        else:
            zm.accumulate(**other)
        zm.update()
    assert farthest(fallen, eager) < 1e-6
