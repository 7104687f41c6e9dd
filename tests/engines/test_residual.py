"""Steps with residual credit: what they do and refuse. Nothing is compiled here: test_residual_code.py is for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support import quantized_models
from tests.support.families import batch, make
from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from zowrap.errors import ZOError
from zowrap.step import credit

RULES = {"zo_sgd": 0.05, "meazo": 1e-3, "zo_adam": 1e-3, "radazo": 1e-3}


@pytest.fixture(autouse=True)
def compile_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)


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


def quantized(scheme: str, engine: str, adapters: bool = False) -> zowrap.ZOModel:
    model = quantized_models.quantized("llama", scheme)
    if adapters:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    return zowrap.zo_wrap(model, "meazo", estimator="residual", engine=engine, lr=3e-3)


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
