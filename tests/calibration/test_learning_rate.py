"""lr="auto": nothing moves while it is chosen, it scales as theory says, and a run keeps what was chosen."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zowrap
from tests.support.devices import gpu_generator
from tests.support.slow import slow_except
from zowrap import rules
from zowrap.calibration.learning_rate import SHARE, preserve_state, tune_lr
from zowrap.errors import ZOError
from zowrap.machine import preserve_rng

HEIGHT, CURVATURE = 3.0, 0.5


class Bowl(nn.Module):
    """Its lowest point, under noisy slopes: f = HEIGHT + slope·(θ − θ₀) + ½ CURVATURE ‖θ − θ₀‖², in two matrices."""

    start: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(20, 20, generator=generator))
        self.b = nn.Parameter(torch.randn(20, 20, generator=generator))
        self.register_buffer("start", torch.cat([self.a.reshape(-1), self.b.reshape(-1)]).detach().clone())


def bowl_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    assert isinstance(model, Bowl)
    theta = torch.cat([model.a.reshape(-1), model.b.reshape(-1)]) - model.start
    return batch["scale"] * (HEIGHT + batch["slope"] @ theta + CURVATURE / 2 * theta.square().sum())


def slopes(scale: float = 1.0, rows: int = 4) -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose mean slope has length about 5."""
    generator = torch.Generator().manual_seed(0)
    while True:
        slope = torch.randn(rows, 800, generator=generator) * 5 * math.sqrt(rows / 800)
        yield {"slope": slope, "scale": torch.tensor(scale)}


def bowl(rule: Any = "meazo", **options: Any) -> zowrap.ZOModel:
    return zowrap.zo_wrap(Bowl(), rule, loss_fn=bowl_loss, engine="eager", lr="auto", **options)


def chosen(rule: Any = "meazo", steps: int = 400, scale: float = 1.0, **options: Any) -> float:
    return tune_lr(bowl(rule, **options), slopes(scale), steps).lr


# --- what it measures ---------------------------------------------------------------------------------------------


def test_the_choice_is_where_the_formula_puts_it():
    choice = tune_lr(bowl(), slopes(), 400)
    sigma = math.sqrt(2 * SHARE * HEIGHT / (CURVATURE * 800))  # F(σ) = ½ CURVATURE σ² d
    assert choice.sigma == pytest.approx(sigma, rel=0.1)
    assert choice.change == pytest.approx(SHARE * HEIGHT, rel=0.01)
    assert choice.loss == pytest.approx(HEIGHT, rel=0.01)
    assert choice.projected_grad == pytest.approx(5, rel=0.3)
    assert choice.lr == pytest.approx(sigma / math.sqrt(400), rel=0.15)  # meazo's steps are η z on average
    assert chosen("zo_sgd") == pytest.approx(sigma / math.sqrt(400) / choice.projected_grad, rel=0.3)


@pytest.mark.parametrize("name", slow_except(["meazo"], rules.REGISTRY))
def test_the_noise_of_a_run_at_the_chosen_rate_costs_what_was_allowed(name):
    zm = bowl(name)
    choice = tune_lr(zm, slopes(), 200)
    batches = slopes(rows=4)
    for _ in range(200):
        zm.step(**next(batches))
    still = {"slope": torch.zeros(1, 800), "scale": torch.tensor(1.0)}
    rise = float(zm.loss(**still)) - HEIGHT  # there is nothing to learn: all of it is wandering
    assert 0.3 * choice.change < rise < 3 * choice.change, (name, rise, choice)


@pytest.mark.parametrize("name", slow_except(["zo_sgd"], rules.REGISTRY))
def test_the_scale_of_the_loss_does_not_matter(name):
    if name == "radazo":
        pytest.skip("its ζ stands inside the root: it is scale-free for projected gradients above 1e-4 alone")
    plain, scaled = chosen(name), chosen(name, scale=1000.0)
    expected = plain if rules.REGISTRY[name].scale_free else plain / 1000
    if name == "hizoo":  # scale-free in H alone
        expected = plain / 1000
    assert scaled == pytest.approx(expected, rel=0.2)


def test_four_times_the_steps_halve_the_rate():
    assert chosen(steps=1600) == pytest.approx(chosen(steps=400) / 2, rel=0.1)


def test_a_falling_schedule_allows_a_higher_rate():
    falling = tune_lr(bowl(), slopes(), 400, schedule=lambda t: 1 - t / 400)
    assert falling.lr == pytest.approx(math.sqrt(3) * chosen(), rel=0.1)


@pytest.mark.slow
def test_what_a_direction_is_does_not_matter():
    joint = chosen()
    assert chosen(direction="rademacher") == pytest.approx(joint, rel=0.15)
    assert chosen(direction="unit_sphere", eps=1e-3 * math.sqrt(800)) == pytest.approx(joint * math.sqrt(800), rel=0.2)
    # Of two blocks each moves in every second step.
    assert chosen(blocks=["a", "b"]) == pytest.approx(joint * math.sqrt(2), rel=0.25)
    # Four directions average to half the length, and meazo divides that out again.
    assert chosen(queries=4) == pytest.approx(joint, rel=0.25)
    assert chosen(estimator="forward") == pytest.approx(joint, rel=0.25)


def test_adapters_that_start_at_zero():
    class Adapted(nn.Module):
        """W + B A with B = 0: A has no slope and no curvature of its own."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.down, self.up = nn.Parameter(torch.randn(4, 50) / 7), nn.Parameter(torch.zeros(50, 4))
            self.target = torch.randn(50, 50) / 50

        def forward(self) -> torch.Tensor:
            return (self.up @ self.down - self.target).square().sum()

    model = Adapted()
    zm = zowrap.zo_wrap(model, "meazo", loss_fn=lambda m, b: m() * b["one"].mean(), engine="eager", lr="auto", eps=1e-3)
    choice = tune_lr(zm, [{"one": torch.ones(1)}], 300)
    before = float(zm.loss(one=torch.ones(1)))
    for _ in range(300):
        zm.step(one=torch.ones(1))
    after = float(zm.loss(one=torch.ones(1)))
    assert after < before - 0.05, (choice, before, after)


# --- what it leaves alone -----------------------------------------------------------------------------------------


def bits(zm: zowrap.ZOModel) -> list[Any]:
    state = zm.state_dict()
    state.pop("loss"), state.pop("lr")
    tensors = [parameter.tensor for parameter in zm.parameters]
    tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    rest = [value for value in state.values() if not isinstance(value, torch.Tensor)]
    return [tensor.detach().clone().numpy().tobytes() for tensor in tensors] + rest


@pytest.mark.parametrize("name", slow_except(["zo_sgd", "fzoo"], rules.REGISTRY))
def test_nothing_moves_and_every_forward_is_counted(name):
    calls = []

    def counted(model, batch):
        calls.append(1)
        return bowl_loss(model, batch)

    zm = zowrap.zo_wrap(Bowl(), name, loss_fn=counted, engine="eager", lr="auto")
    before, generators = bits(zm), (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    watched: list[tuple[int, int]] = []
    choice = tune_lr(zm, slopes(), 400, watch=lambda done, most: watched.append((done, most)))
    assert bits(zm) == before
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[:2]
    assert torch.get_rng_state().equal(generators[2])
    assert choice.forwards == len(calls) <= 0.05 * 400 * len(zm.points)
    assert watched == [(i, 20) for i in range(len(watched))]
    assert zm.lr == choice.lr and zm.step_count == 0
    assert "chosen for 400 steps" in str(choice)


def test_the_generator_of_a_gpu_stands_where_it_stood_too(monkeypatch):
    device, drawn = torch.device("cuda", 1), gpu_generator(monkeypatch)
    zm = bowl()
    monkeypatch.setattr(zm.job, "device", device)
    for kept in (preserve_state(zm), preserve_rng(device)):
        with kept:
            drawn.position += 5
    assert drawn.position == 0 and drawn.devices == {device}


def test_it_does_not_depend_on_the_rate_that_was_set():
    zm = bowl()
    first = tune_lr(zm, slopes(), 400)
    zm.lr = 17.0
    assert tune_lr(zm, slopes(), 400) == first


def test_micro_batches_of_one_step_are_one_batch():
    def halves(batch):
        return [{"slope": part, "scale": batch["scale"]} for part in batch["slope"].split(2)]

    whole, split = tune_lr(bowl(), slopes(), 200), tune_lr(bowl(), map(halves, slopes()), 200)
    assert split.lr == pytest.approx(whole.lr, rel=1e-3) and split.forwards == 2 * whole.forwards


# --- what it refuses ----------------------------------------------------------------------------------------------


def test_no_step_is_made_at_a_rate_that_is_not_chosen():
    zm = bowl()
    before = [parameter.tensor.clone() for parameter in zm.parameters]
    with pytest.raises(ZOError, match=r"lr='auto' is not chosen yet: zowrap.tune_lr"):
        zm.step(**next(slopes()))
    assert all(a.equal(b.tensor) for a, b in zip(before, zm.parameters, strict=True))
    zm.lr = 1e-3
    zm.step(**next(slopes()))
    with pytest.raises(ZOError, match="has made 1"):
        tune_lr(zm, slopes(), 100)
    with pytest.raises(ZOError, match="or 'auto', got 'fast'"):
        zowrap.zo_wrap(Bowl(), lr="fast")


@pytest.mark.parametrize(
    ("batches", "steps", "message"),
    [
        ([], 100, "at least one training batch"),
        (slopes(), 0, "steps must be a whole number from 1"),
        (slopes(scale=math.nan), 100, "not finite from the start"),
        (slopes(scale=0.0), 100, "nothing to go by"),
    ],
)
def test_what_it_cannot_use_is_said(batches, steps, message):
    zm = bowl()
    with pytest.raises(ZOError, match=message):
        tune_lr(zm, batches, steps)
    assert math.isnan(zm.lr) and zm.step_count == 0 and zm.eps == 1e-3


def test_parameters_without_influence_are_named_as_the_reason():
    zm = zowrap.zo_wrap(Bowl(), loss_fn=lambda model, batch: batch["x"], engine="eager", lr="auto")
    with pytest.raises(ZOError, match="check that what moves changes the loss"):
        tune_lr(zm, [{"x": torch.ones(4)}], 100)


def test_an_objective_without_a_slope_is_told_in_a_sentence() -> None:
    model = torch.nn.Linear(3, 1)
    zm = zowrap.zo_wrap(
        model, "meazo", lr="auto", eps=1e-6, loss_fn=lambda m, b: (m(b["x"])[:, 0] > 100).float(), engine="eager"
    )
    with pytest.raises(ZOError, match="nothing to go by"):
        zowrap.tune_lr(zm, [{"x": torch.ones(4, 3)}], steps=50)
    with pytest.raises(ZOError, match="several batches"):
        zowrap.tune_lr(zm, {"x": torch.ones(4, 3)}, steps=50)
