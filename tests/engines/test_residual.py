"""Steps with residual credit: the engines agree, and so do the two schedules; runs go on bitwise, and descend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support import quantized_models
from tests.support.families import batch, make
from tests.support.slow import slow_except
from zowrap.errors import ZOError
from zowrap.step import credit

RULES = {"zo_sgd": 0.05, "meazo": 1e-3, "zo_adam": 1e-3, "radazo": 1e-3}


def wrap(name: str = "gpt2", engine: str = "compiled", rule: Any = "meazo", **options: Any) -> zowrap.ZOModel:
    lr = options.pop("lr", RULES.get(rule, 1e-3))
    return zowrap.zo_wrap(make(name), rule, estimator="residual", engine=engine, lr=lr, **options)


def tune(zm: zowrap.ZOModel, name: str = "gpt2", steps: int = 4, first: int = 0) -> list[zowrap.StepResult]:
    return [zm.step(**batch(name, 3 + t % 2, 9 - t % 3, seed=t % 3)) for t in range(first, first + steps)]


def weights(zm: zowrap.ZOModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in zm.model.state_dict().items()}


def farthest(first: zowrap.ZOModel, second: zowrap.ZOModel) -> float:
    one, other = weights(first), weights(second)
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def same(first: zowrap.ZOModel, second: zowrap.ZOModel) -> bool:
    one, other = weights(first), weights(second)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rule", slow_except(("meazo", "zo_adam"), RULES))
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


@pytest.mark.parametrize("memory", ["paired", "sequential"])
def test_micro_batches_make_the_step_of_their_union(memory: str) -> None:
    whole, parts = wrap(engine="eager"), wrap(memory=memory)
    given = batch("gpt2", 4, 9)
    whole.step(**given)
    for rows in (slice(0, 1), slice(1, 4)):
        parts.accumulate(**{name: value[rows] for name, value in given.items()})
    parts.update()
    assert farthest(whole, parts) < 1e-6


@pytest.mark.parametrize("rule", slow_except(("zo_adam",), ("meazo", "zo_adam")))
def test_a_state_goes_on_bitwise(rule: str) -> None:
    whole, first, second = wrap(rule=rule), wrap(rule=rule), wrap(rule=rule)
    tune(whole, steps=5)
    tune(first, steps=3)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    tune(second, steps=2, first=3)
    assert same(whole, second)


def test_the_loss_falls_at_once() -> None:
    zm, given = wrap("opt", rule="meazo", lr=2e-3), batch("opt", 3, 9)
    before = float(zm.loss(**given))
    for _ in range(20):
        zm.step(**given)
    assert float(zm.loss(**given)) < before - 0.15  # at random weights; MeZO moves it by 0.01


@pytest.mark.parametrize("dtype", slow_except((torch.bfloat16,), (torch.bfloat16, torch.float16)))
def test_sixteen_bit_weights_follow_those_of_float32(dtype: torch.dtype) -> None:
    given, losses = batch("opt", 3, 9), []
    for kind in (torch.float32, dtype):
        zm = zowrap.zo_wrap(make("opt", kind), "meazo", estimator="residual", engine="compiled", lr=5e-4)
        before = float(zm.loss(**given))
        for _ in range(40):
            zm.step(**given)
        losses.append(before - float(zm.loss(**given)))
    assert abs(losses[1] / losses[0] - 1) < 0.05


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    for memory in ("paired", "sequential"):
        zm = wrap(memory=memory)
        with torch.no_grad():
            zm.model.transformer.ln_f.weight[0] = torch.nan
        before = weights(zm)
        result = zm.step(**batch("gpt2", 3, 9))
        assert result.skipped and zm.step_count == 1
        assert all(torch.equal(before[n].nan_to_num(), t.nan_to_num()) for n, t in weights(zm).items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries": 2}, "queries=2 does nothing with estimator='residual'"),
        ({"direction": "rademacher"}, "direction='rademacher' does nothing with"),
        ({"blocks": "layer"}, "blocks does nothing with"),
        ({"eps": 1e-3}, "eps=0.001 does nothing with"),
        ({"along": "evaluated"}, "along='evaluated' does nothing with"),
        ({"rule": "fzoo"}, "fzoo needs the directions of its steps"),
        ({"rule": "hizoo"}, "hizoo needs the directions of its steps"),
        ({"rule": "conmezo"}, "conmezo needs the directions of its steps"),
        ({"rule": "lozo"}, "lozo needs the directions of its steps"),
        ({"rule": "sparse_mezo"}, "sparse_mezo needs the directions of its steps"),
    ],
)
def test_what_it_has_no_use_for_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ZOError, match=words):
        wrap(**options)


def test_losses_alone_do_not_repeat_a_step() -> None:
    zm = wrap(engine="eager")
    record = tune(zm, steps=1)[0].record()
    other = wrap(engine="eager")
    for repeat in (lambda: other.replay(record), lambda: other.update(losses=torch.ones(1))):
        with pytest.raises(ZOError, match="its steps are repeated with the data"):
            repeat()


def test_what_is_accumulated_can_be_looked_at() -> None:
    zm = wrap(engine="eager")
    zm.accumulate(**batch("gpt2", 3, 9))
    losses, g = zm.peek()
    assert losses.shape == (1,) and g.shape == (1,) and float(g) > 0
    assert torch.equal(zm.update().projected_grad.reshape(1), g)


def test_the_report_says_what_moves_and_what_it_is() -> None:
    zm = wrap()
    assert "which the first batch shows" in str(zm.inspect())
    tune(zm, steps=1)
    report = zm.inspect()
    assert "forward-only, not zeroth-order" in str(report)
    names = [name for name, *_ in report.moves]
    assert len(names) == 8 and all("c_proj" in name for name in names)
    moving = sum(p.tensor.numel() for p in zm.parameters if "c_proj" in p.name)
    assert report.elements == moving
    assert report.costs is not None and report.costs.schedules["sequential"] <= report.costs.schedules["paired"]


def test_a_model_that_cannot_be_compiled_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from zowrap.engines import compiled

    def fails(*args: Any, **options: Any) -> Any:
        raise KeyError("val")

    monkeypatch.setattr(compiled, "compile_regions", fails)
    fallen, eager = wrap(engine=None), wrap(engine="eager")
    with pytest.warns(UserWarning, match="running eagerly"):
        tune(fallen)
    tune(eager)
    assert same(fallen, eager)


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


def quantized(scheme: str, engine: str, adapters: bool = False) -> zowrap.ZOModel:
    model = quantized_models.quantized("llama", scheme)
    if adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    return zowrap.zo_wrap(model, "meazo", estimator="residual", engine=engine, lr=3e-3)


@pytest.mark.parametrize(
    ("scheme", "adapters", "moved"),
    [
        ("int8", False, ("o_proj.log_scale", "down_proj.log_scale")),
        pytest.param(
            *("int8 with outliers", False, ("o_proj.log_scale", "down_proj.log_scale")), marks=pytest.mark.slow
        ),
        pytest.param("int8", True, ("o_proj.lora_B", "down_proj.lora_B"), marks=pytest.mark.slow),
        ("nf4", True, ("o_proj.lora_B", "down_proj.lora_B")),
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


def test_scales_get_their_gradients() -> None:
    """Those of the last product are exact; they are compared with differences of losses."""
    zm, given = quantized("int8", "eager"), batch("llama", 3, 9)
    zm.accumulate(**given)
    index = max(i for i in zm.accumulator.credit.parameters if "down_proj" in zm.parameters[i].name)
    weight = zm.accumulator.weight
    assert weight is not None
    g = credit.gradient(zm.accumulator.credit.of(index), (1 / weight).float(), zm.parameters[index].tensor.shape)
    scale, step = zm.parameters[index].tensor, 1e-2
    for row in (0, 7, 31):
        losses = []
        for sign in (1, -1):
            scale[row] += sign * step
            losses.append(float(zm.loss(**given)))
            scale[row] -= sign * step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(g[row]), rel=0.02, abs=1e-5)


def test_codes_are_refused() -> None:
    with pytest.raises(ZOError, match="quantized='codes' moves along noise"):
        zowrap.zo_wrap(quantized_models.quantized("llama", "int8"), estimator="residual", quantized="codes")


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


def test_a_model_that_cannot_be_captured_is_refused_with_what_works() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) if float(self.a.weight.sum()) > 0 else x

    zm = zowrap.zo_wrap(Branches(), loss_fn=lambda model, given: model(given["x"]).mean(-1), estimator="residual")
    with pytest.raises(ZOError, match=r"residual credit follows the flow of data .* estimator='central'"):
        zm.step(x=torch.ones(3, 4))
