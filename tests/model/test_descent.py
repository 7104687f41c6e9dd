"""The checks of residual credit: a step that goes too far is shortened, and a run that does not descend is told."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import batch, make, snapshot, unchanged
from tests.support.tiny_run import trainer_in
from zowrap.errors import ZOError, ZOWarning
from zowrap.model import zo_model
from zowrap.step.credit import gradient


class Sum(nn.Module):
    """One block and a stream: credit is the gradient, and the loss a parabola along it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Turned(Sum):
    """A later block turns the stream round, which the credit of the earlier one leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.later.weight.copy_(-3 * torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h + self.later(h)


def squares(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return (model(given["x"]) - given["y"]).square().mean(-1)


def wrap(model: nn.Module | None = None, rule: Any = "zo_sgd", **options: Any) -> zowrap.ZOModel:
    options = {"engine": "eager", "trainable": "inner.weight", "loss_fn": squares, "lr": 0.1, **options}
    return zowrap.zo_wrap(model or Sum(), rule, estimator="residual", **options)


def numbers(seed: int = 0, rows: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 4, generator=draw), "y": torch.randn(rows, 4, generator=draw)}


@pytest.mark.parametrize("rule", ["zo_sgd", "meazo"])
def test_a_step_that_goes_too_far_ends_at_the_lowest_point(rule: str) -> None:
    """Along a parabola: the line search is exact."""
    zm, given = wrap(rule=rule, lr=30.0), numbers()
    zm.accumulate(**given)
    g = gradient(zm.accumulator.credit.pieces, torch.tensor(1 / 8), (4, 4))
    zm.discard()
    result = zm.step(**given)
    assert zm.descent.factor < 0.5 and zm.lr == 30.0
    assert result.record()["lr"] == pytest.approx(30.0 * zm.descent.factor)
    after = float(zm.loss(**given))
    for other in (0.97, 1.03):  # a little less or more along the same line is higher
        moved = Sum()
        step = (Sum().inner.weight - zm.model.inner.weight).detach()
        assert torch.allclose(step / step.norm(), g / g.norm(), atol=1e-5)
        with torch.no_grad():
            moved.inner.weight.sub_(other * step)
        assert float(squares(moved, given).mean().detach()) > after


def test_what_a_check_measures_is_the_loss_along_the_step() -> None:
    zm, given = wrap(lr=1e-3), numbers()
    zm.step(**given)
    found, model = zm.descent.last, Sum()
    assert found is not None and zm.descent.factor == 1.0
    loss = squares(model, given).mean()
    (g,) = torch.autograd.grad(loss, [model.inner.weight])
    z = g / g.square().mean().sqrt()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert found.step == pytest.approx(1e-3 * float(g.square().mean().sqrt()), rel=0.6)  # rms(G) is estimated
    estimated = found.step / 1e-3 / float(g.square().mean().sqrt())
    assert found.slope == pytest.approx(float((g * z).sum()) / estimated, rel=0.01)


@pytest.mark.parametrize("memory", ["paired", pytest.param("sequential", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_check_leaves_the_weights_as_they_were(memory: str, dtype: torch.dtype) -> None:
    """A step that is short enough is bitwise the step without checks."""

    def tuned(every: int) -> zowrap.ZOModel:
        model = make("gpt2", dtype)
        zm = zowrap.zo_wrap(model, estimator="residual", lr=1e-4, check_every=every, memory=memory, engine=None)
        for seed in range(3):
            zm.step(**batch("gpt2", 3, 8, seed))
        return zm

    checked, plain = tuned(1), tuned(0)
    assert checked.descent.last is not None and plain.descent.last is None
    assert unchanged(checked.model, snapshot(plain.model))


def test_a_rate_that_was_lowered_comes_back() -> None:
    zm = wrap(lr=30.0, check_every=1)
    zm.step(**numbers())
    low = zm.descent.factor
    zm.lr = 1e-3
    zm.step(**numbers(1))
    assert low < zm.descent.factor <= 4.001 * low
    for seed in range(2, 20):
        zm.step(**numbers(seed))
    assert zm.descent.factor == 1.0


def test_a_loss_that_is_not_finite_far_away_is_no_end() -> None:
    class Steep(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).exp()

    zm, given = wrap(Steep(), lr=100.0), numbers()
    before = float(zm.loss(**given))
    result = zm.step(**given)
    assert not result.skipped and math.isfinite(float(zm.loss(**given))) and float(zm.loss(**given)) < before


def test_credit_that_climbs_is_told_and_its_rate_lowered() -> None:
    zm = wrap(Turned(), lr=1e-3, check_every=2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(8):
            zm.step(**numbers())
            assert zm.descent.stalled == (step >= 4)
    sentences = [str(each.message) for each in told if issubclass(each.category, ZOWarning)]
    assert sentences == [
        "at step 4, residual credit no longer lowers the loss of its own batch (3 checks in a row, 2 steps apart): "
        "estimator 'central' or 'population' can go on from these weights"
    ]
    assert zm.descent.factor == 0.5**4


def test_a_state_holds_what_the_checks_found() -> None:
    def steps(zm: zowrap.ZOModel, first: int, last: int) -> None:
        for seed in range(first, last):
            zm.step(**numbers(seed))

    whole = wrap(lr=30.0, check_every=3)
    steps(whole, 0, 5)
    state, weights = whole.state_dict(), snapshot(whole.model)
    assert state["descent/factor"] < 1
    steps(whole, 5, 10)
    other = wrap(lr=30.0, check_every=3)
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    steps(other, 5, 10)
    assert unchanged(other.model, snapshot(whole.model)) and other.state_dict().keys() == state.keys()
    with pytest.raises(ZOError, match="saved with check_every=3, the model is wrapped with 4"):
        wrap(lr=30.0, check_every=4).load_state_dict(state)
    for name, value in (("descent/factor", -1.0), ("descent/failed", "many")):
        with pytest.raises(ZOError, match=f"damaged: its {name}"):
            other.load_state_dict({**state, name: value})


def test_micro_batches_are_checked_as_one_batch() -> None:
    whole, parts = wrap(lr=30.0), wrap(lr=30.0)
    given = numbers()
    whole.step(**given)
    for rows in (slice(0, 3), slice(3, 8)):
        parts.accumulate(**{name: value[rows] for name, value in given.items()})
    parts.update()
    assert parts.descent.factor == pytest.approx(whole.descent.factor, rel=1e-5)


@pytest.mark.parametrize("value", [-1, 1.5, "often", True])
def test_a_wrong_number_of_steps_is_refused(value: Any) -> None:
    with pytest.raises(ZOError, match="check_every must be a whole number from 0"):
        wrap(check_every=value)


TURNED: list[tuple[str, dict[str, Any]]] = [
    ("zo_sgd", {"sign": "elementwise"}),
    ("zo_sgd", {"momentum": 0.9}),
    ("zo_adam", {}),
    ("radazo", {}),
]


@pytest.mark.parametrize(("rule", "options"), TURNED, ids=str)
def test_a_rule_that_turns_its_steps_is_not_checked(rule: str, options: dict[str, Any]) -> None:
    """What would be measured is not the step that is made."""
    made = zowrap.rules.get(rule, **options)
    zm = wrap(rule=made)
    zm.step(**numbers())
    assert zm.descent.every == 0 and zm.descent.last is None
    with pytest.raises(ZOError, match=r"check_every=4 is for rules whose steps go along the credit itself"):
        wrap(rule=made, check_every=4)


def test_the_step_that_is_checked_is_the_one_that_meazo_makes() -> None:
    """Its length falls with the gradient, because it divides by a running size."""
    zm = wrap(rule="meazo", lr=1e-3, check_every=1)
    for seed in range(12):
        before = zm.model.inner.weight.detach().clone()
        zm.step(**numbers(seed))
        moved = float((zm.model.inner.weight - before).detach().square().mean().sqrt())
        assert zm.descent.last is not None and zm.descent.factor == 1.0
        assert zm.descent.last.step == pytest.approx(moved, rel=0.6)  # z has the root mean square 1 by estimate


def test_other_estimators_are_not_checked() -> None:
    with pytest.raises(ZOError, match=r"check_every=4 is for estimator='residual': what 'central' estimates"):
        zowrap.zo_wrap(make("llama"), check_every=4)


def test_a_run_that_no_longer_descends_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zo_model, "losses_along", lambda zm, batches, distances: [float(d) for d in distances])
    trainer = trainer_in(tmp_path, estimator="residual", check_every=2, max_steps=20, learning_rate=1e-4)
    with pytest.warns(ZOWarning, match="no longer lowers the loss"):
        trainer.train()
    assert trainer.state.global_step == 5 and not trainer.interrupted
    assert "the run ends after step 5, because its steps no longer descend" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").is_file()
