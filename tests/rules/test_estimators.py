"""Exact forward gradients against autograd and central differences; conservative steps."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import zowrap
from tests.support.families import batch, make, snapshot, unchanged
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.loss.module import LossModule


def slope_by_autograd(zm, inputs, query: int = 0) -> tuple[float, float]:
    """∇f(θ)·z by a backward pass, and ‖∇f‖·‖z‖, the scale of its rounding."""
    drawn = zm.directions.queries[query]
    zs = [zm.engine.direction(drawn, i) for i in range(len(zm.parameters))]
    tensors = [p.tensor.detach().clone().requires_grad_() for p in zm.parameters]
    named = {f"model.{name}": t for p, t in zip(zm.parameters, tensors, strict=True) for name in p.names}
    was = zm.job.loss.training
    sums, weights = torch.func.functional_call(zm.job.loss.eval(), named, (inputs,))
    zm.job.loss.train(was)
    gradients = torch.autograd.grad(sums.sum() / weights.sum(), tensors)
    slope = sum((g.double() * z).sum() for g, z in zip(gradients, zs, strict=True))
    norms = [torch.sqrt(sum(t.double().square().sum() for t in each)) for each in (gradients, zs)]
    return float(slope), float(norms[0] * norms[1])


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("direction", ["gaussian", "lowrank(1)"])
def test_forward_gradients_are_autograds(name, direction) -> None:
    zm = zowrap.zo_wrap(make(name), "zo_sgd", estimator="forward_gradient", direction=direction, queries=2)
    inputs = batch(name, 3, 8)
    expected = [slope_by_autograd(zm, inputs, query) for query in range(2)]
    result = zm.step(**inputs)
    assert zm.inspect().engine == "eager" and result.projected_grad.shape == (2,)
    for g, (slope, scale) in zip(result.projected_grad, expected, strict=True):
        assert abs(float(g) - slope) <= 1e-5 * max(abs(slope), 0.02 * scale)
    assert torch.allclose(result.loss, zowrap.zo_wrap(make(name), engine="eager").loss(**inputs), rtol=1e-5)


class Curved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(x)


def curved_loss(model, inputs):
    return (model(inputs["x"]) - 1).square().sum(-1)


def curved(rule="zo_sgd", **options):
    options = {"lr": 0.05, "engine": "eager", "loss_fn": curved_loss, **options}
    return zowrap.zo_wrap(Curved(), rule, **options)


X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize("direction", ["gaussian", "sphere", "lowrank(2)"])
def test_central_differences_approach_the_forward_gradient_quadratically(direction) -> None:
    exact = curved(estimator="forward_gradient", direction=direction).step(x=X).projected_grad
    errors = [abs(float(curved(eps=eps, direction=direction).step(x=X).projected_grad - exact)) for eps in (0.1, 0.05)]
    assert errors[1] > 1e-4  # well above the rounding of a float32 loss
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_forward_gradients_of_micro_batches_are_those_of_their_union() -> None:
    whole, split = curved(estimator="forward_gradient"), curved(estimator="forward_gradient")
    one = whole.step(x=X)
    split.accumulate(x=X[:1])
    split.accumulate(x=X[1:])
    assert torch.allclose(one.projected_grad, split.update().projected_grad, rtol=1e-5)


def test_a_forward_gradient_step_replays_bitwise() -> None:
    zm, other = (curved("meazo", estimator="forward_gradient", blocks=["layers.0", "layers.2"]) for _ in range(2))
    for _ in range(3):
        other.replay(json.loads(json.dumps(zm.step(x=X).record())))
    assert unchanged(other.model, snapshot(zm.model))


def test_forward_gradients_are_a_reference_and_say_so() -> None:
    with pytest.raises(ZOError, match="runs with engine='eager' alone"):
        curved(estimator="forward_gradient", engine="compiled")
    with pytest.raises(ZOError, match="losses alone do not give"):
        curved(estimator="forward_gradient").update(losses=torch.zeros(1))
    with pytest.raises(ZOError, match="estimator must be 'central'"):
        curved("hizoo", estimator="forward_gradient")
    with pytest.raises(ZOError, match="did you mean 'forward_gradient'"):
        curved(estimator="forward_gradients")


def test_a_model_without_a_forward_mode_derivative_is_named() -> None:
    zm = curved(estimator="forward_gradient", loss_fn=lambda m, b: torch.cdist(m(b["x"]), b["x"][:, :2], p=1).sum(-1))
    before = snapshot(zm.model)
    with pytest.raises(ZOError, match="no exact forward gradient"):
        zm.step(x=X)
    assert unchanged(zm.model, before) and zm.step_count == 0


# --- conservative steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sign": "scalar"}], ids=str)
def test_conservative_steps_never_raise_the_loss_of_their_batch(options) -> None:
    """With a rate far too high plain steps raise it often."""
    rates = {"conservative": 0, "plain": 0}
    for kind in rates:
        zm = curved(rules.zo_sgd(conservative=kind == "conservative", **options), lr=0.4, direction="lowrank(1)")
        for step in range(20):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            before = zm.loss(x=x)
            result = zm.step(x=x)
            assert result.losses.shape == ((5,) if kind == "conservative" else (2,)) and not result.skipped
            rates[kind] += bool(zm.loss(x=x) > before * (1 + 1e-6))
            if kind == "conservative":
                assert torch.allclose(result.losses[2], before, rtol=1e-6)
                assert torch.allclose(zm.loss(x=x), result.losses[2:].min(), rtol=1e-5)
    assert rates["conservative"] == 0 < rates["plain"]


def test_a_conservative_step_makes_five_forwards(monkeypatch) -> None:
    calls = []
    forward = LossModule.forward
    monkeypatch.setattr(LossModule, "forward", lambda self, batch: calls.append(1) or forward(self, batch))
    zm = curved(rules.zo_sgd(conservative=True))
    zm.step(x=X)
    assert len(calls) == 5


@pytest.mark.parametrize("memory", ["paired", "sequential"])
def test_conservative_steps_over_micro_batches_compare_the_whole_batch(memory) -> None:
    whole, split = (curved(rules.zo_sgd(conservative=True), lr=0.3, memory=memory) for _ in range(2))
    for _ in range(4):
        one = whole.step(x=X)
        split.accumulate(x=X[:1])
        split.accumulate(x=X[1:])
        other = split.update()
        assert torch.allclose(one.losses, other.losses, rtol=1e-5)
        split.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))


def test_conservative_steps_replay_bitwise() -> None:
    zm, other = (curved(rules.zo_sgd(conservative=True), lr=0.5) for _ in range(2))
    for step in range(6):
        other.replay(json.loads(json.dumps(zm.step(x=X * (step - 2)).record())))
    assert unchanged(other.model, snapshot(zm.model))


def test_conservative_steps_need_the_losses_of_their_candidates() -> None:
    zm = curved(rules.zo_sgd(conservative=True))
    before = snapshot(zm.model)
    with pytest.raises(ZOError, match="losses of its candidates"):
        zm.update(projected_grad=torch.tensor(1.0))
    with pytest.raises(ZOError, match="5 evaluations"):
        zm.update(losses=torch.zeros(2))
    assert zm.update(losses=torch.tensor([1.0, 0.5, 1.0, torch.nan, 1.0])).skipped and unchanged(zm.model, before)
    assert not zm.update(losses=torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0])).skipped
    assert unchanged(zm.model, before)  # θ itself is the first among equals
