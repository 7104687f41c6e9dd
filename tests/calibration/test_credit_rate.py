"""``lr="auto"`` of residual credit: steps to the lowest point of their batch, with the weights bitwise unmoved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import batch, make
from zowrap.calibration import credit_rate
from zowrap.calibration.credit_rate import CreditRate
from zowrap.errors import ZOError


class Sum(nn.Module):
    """A stream of one block whose loss is quadratic in the only matrix that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x.tanh())


def squares(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return (model(given["x"]) - given["y"]).square().sum(-1)


def wrap(rule: Any = "zo_sgd", **options: Any) -> zowrap.ZOModel:
    torch.manual_seed(0)
    options = {"engine": "eager", "loss_fn": squares, **options}
    return zowrap.zo_wrap(Sum(), rule, estimator="residual", lr="auto", **options)


def batches(count: int = 5, rows: int = 8) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(2, rows, 4, generator=draw) for _ in range(count)]
    return [{"x": x, "y": x + 0.3 * y} for x, y in made]


@pytest.mark.parametrize("rule", ["zo_sgd", "meazo"])
def test_a_step_of_that_rate_is_the_best_one(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit_rate, "LARGEST", 10.0)
    zm, one = wrap(rule), batches(1, rows=64)
    before = zm.model.block.weight.detach().clone()
    choice = zowrap.tune_lr(zm, one, 10)
    assert isinstance(choice, CreditRate) and zm.lr == choice.lr and zm.step_count == 0
    assert torch.equal(zm.model.block.weight, before)
    losses = [float(zm.loss(**one[0]))]
    zm.step(**one[0])
    losses.append(float(zm.loss(**one[0])))
    best = choice.slope**2 / (2 * choice.curvature)
    assert losses[0] - losses[1] == pytest.approx(best, rel=0.03) and choice.forwards == 3


def test_where_the_loss_hardly_curves_a_step_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded, free = wrap(), wrap()
    monkeypatch.setattr(credit_rate, "LARGEST", 0.001)
    choice = zowrap.tune_lr(bounded, batches(), 10)
    assert choice.step == pytest.approx(0.001 * float(bounded.model.block.weight.norm()) / 4**0.5 / 4, rel=0.01)
    monkeypatch.setattr(credit_rate, "LARGEST", 100.0)
    assert choice.step < 0.5 * zowrap.tune_lr(free, batches(), 10).step
    assert "moves a weight by about" in str(choice) and CreditRate(**choice.record()) == choice


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        pytest.param("eager", torch.float32, marks=pytest.mark.slow),
        ("eager", torch.bfloat16),
        pytest.param("compiled", torch.float32, marks=pytest.mark.slow),
        pytest.param("compiled", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_weights_and_state_are_unmoved(engine: str, dtype: torch.dtype) -> None:
    model = make("gpt2", dtype)
    memory = "sequential" if engine == "compiled" else "auto"
    zm = zowrap.zo_wrap(model, "zo_adam", estimator="residual", lr="auto", engine=engine, memory=memory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zowrap.tune_lr(zm, [batch("gpt2", 3, 9)], 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(not slot.any() for slots in zm.job.slots.values() for slot in slots)
    assert not zm.accumulated
    zm.step(**batch("gpt2", 3, 9))
    assert zm.step_count == 1


@pytest.mark.slow
def test_rates_of_both_engines_agree() -> None:
    rates = []
    for engine in ("eager", "compiled"):
        zm = zowrap.zo_wrap(make("gpt2"), estimator="residual", lr="auto", engine=engine)
        rates.append(zowrap.tune_lr(zm, [batch("gpt2", 3, 9)], 10).lr)
    assert rates[0] == pytest.approx(rates[1], rel=0.02)


class Turned(Sum):
    """A later block turns the stream round, which credit leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h + self.later(h)

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.later.weight.copy_(-3 * torch.eye(4))


def test_credit_that_does_not_lower_the_loss_is_told() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"engine": "eager", "loss_fn": squares, "trainable": "block.weight"}
    zm = zowrap.zo_wrap(Turned(), "zo_sgd", estimator="residual", lr="auto", **options)
    with pytest.raises(ZOError, match="found no step along the residual credit"):
        zowrap.tune_lr(zm, batches(2), 10)


def test_vectors_alone_have_no_gain_to_go_by() -> None:
    """Their loss curves, which bounds the step."""

    class Shift(Sum):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

    torch.manual_seed(0)
    options: dict[str, Any] = {"engine": "eager", "loss_fn": squares, "trainable": "block.bias"}
    zm = zowrap.zo_wrap(Shift(), "zo_sgd", estimator="residual", lr="auto", **options)
    choice = zowrap.tune_lr(zm, batches(1), 10)
    assert isinstance(choice, CreditRate) and choice.step == pytest.approx(choice.slope / choice.curvature)


@pytest.mark.parametrize(("steps", "measured"), [(10, 1), (64, 2), (1000, 4)])
def test_longer_runs_measure_more_batches(steps: int, measured: int) -> None:
    choice = zowrap.tune_lr(wrap(), batches(), steps)
    assert choice.forwards == 3 * measured


def test_a_loss_that_is_not_finite_is_told() -> None:
    given = batches(2)
    given[0]["x"][0, 0] = torch.nan
    with pytest.raises(ZOError, match="not finite"):
        zowrap.tune_lr(wrap(), given, 10)


def test_it_needs_a_batch() -> None:
    with pytest.raises(ZOError, match="at least one training batch"):
        zowrap.tune_lr(wrap(), [], 10)


def test_micro_batches_count_by_their_labels() -> None:
    zm = zowrap.zo_wrap(make("gpt2"), estimator="residual", lr="auto", engine="eager")
    given = batch("gpt2", 3, 9)
    without = {**given, "labels": torch.full_like(given["labels"], -100)}
    found = zowrap.tune_lr(zm, [[given, without]], 10).lr
    assert found == pytest.approx(zowrap.tune_lr(zm, [[given]], 10).lr, rel=1e-3)
    with pytest.raises(ZOError, match="not finite from the start"):
        zowrap.tune_lr(zm, [{**given, "labels": without["labels"]}], 10)
