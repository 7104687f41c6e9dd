"""Low-rank directions: thin in the forward, the same in probe, update and replay, and lazily resampled."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import zowrap
from tests.engines.test_compiled import Odd, odd_batch, odd_loss
from tests.support.slow import slow_except
from zowrap import rules
from zowrap.names import ENGINES
from zowrap.testing import wrap

OPTIONS = {
    "rank 1, momentum, decay": {"rule": rules.zo_sgd(momentum=0.9), "direction": "lowrank(1)", "weight_decay": 0.1},
    "rank 2, lozo_m": {"rule": rules.lozo_m(rank=2, nu=2, beta1=0.5), "blocks": ["embed*", "*"]},
    "rank 6, two queries": {"rule": "meazo", "direction": "lowrank(6)", "queries": 2},
}


@pytest.mark.parametrize("name", slow_except(["rank 1, momentum, decay"], OPTIONS))
def test_engines_agree_along_low_rank_directions(name) -> None:
    """Losses and trajectories, for a tied pair, a convolution, a transposed product and vectors."""
    runs = []
    for engine in ENGINES:
        torch.manual_seed(0)
        zm = zowrap.zo_wrap(Odd(), lr=1e-2, loss_fn=odd_loss, engine=engine, **OPTIONS[name])
        start = {p.name: p.tensor.detach().clone() for p in zm.parameters}
        draw, losses = torch.Generator().manual_seed(1), []
        for step in range(5):
            zm.accumulate(**odd_batch(rows=5 - step))  # down to a batch of one
            losses.append(zm.peek()[0])
            zm.update(projected_grad=torch.randn(zm.job.queries, generator=draw))
        assert zm.inspect().engine == engine
        runs.append((zm, torch.cat(losses), start))
    (one, losses_one, start), (other, losses_other, _) = runs
    assert torch.allclose(losses_one, losses_other, rtol=2e-5)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert (a.tensor - b.tensor).norm() <= 1e-5 * (a.tensor - start[a.name]).norm() > 0, a.name


def factors(zm) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(U, V) of every parameter at the current step."""
    (stream,) = zm.directions.queries
    places = zm.job.layouts[stream.block].places
    found = []
    for place in places.values():
        right = place.right_of(stream.factors)
        found.append((place.left_of(stream.factors)[0].clone(), None if right is None else right[0].clone()))
    return found


class Wide(nn.Module):
    """Matrices large enough that a correlation would show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(900, 1000)), nn.Parameter(torch.zeros(1000, 900))


def wide(**options):
    options = {"rule": "zo_sgd", "direction": "lowrank(2)", "trainable": None, **options}
    return zowrap.zo_wrap(Wide(), loss_fn=lambda m, b: m.a.sum(), engine="eager", **options)


def test_factors_are_independent_of_each_other() -> None:
    zm = wide()
    found = []
    for _ in range(2):
        found += [t.flatten()[:1800] for pair in factors(zm) for t in pair]
        zm.update(projected_grad=torch.tensor(0.0))
    correlation = torch.corrcoef(torch.stack(found)) - torch.eye(8)
    assert correlation.abs().max() < 5 / 1800**0.5


def test_right_factors_stay_for_nu_steps_and_left_ones_never() -> None:
    zm = wide(direction="lowrank(2, nu=3)")
    rights, lefts = [], []
    for _ in range(7):
        (left, right), _ = factors(zm)
        lefts.append(left)
        rights.append(right)
        zm.update(projected_grad=torch.tensor(0.0))
    same = [torch.equal(a, b) for a, b in itertools.pairwise(rights)]
    assert same == [True, True, False, True, True, False]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(lefts))


def test_factors_do_not_depend_on_what_else_is_tunable() -> None:
    both, alone = wide(), wide(trainable=["b"])
    for a, b in zip(factors(both)[1], factors(alone)[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rule", "share"), [(rules.lozo(nu=3), 0.5), (rules.lozo(nu=3, scale="code"), 1.0)])
def test_lozo_updates_along_its_probe_at_resampling_steps_too(rule, share, engine) -> None:
    zm = wrap(rule, engine=engine, lr=1.0)
    oracle = getattr(zm.engine, "eager", zm.engine)
    for _ in range(7):  # V is drawn at steps 0, 3 and 6
        (stream,) = zm.directions.queries
        probes = [oracle.direction(stream, i) for i in range(len(zm.parameters))]
        for p in zm.parameters:
            p.tensor.data.zero_()
        zm.update(projected_grad=torch.tensor(-1.0))
        for z, p in zip(probes, zm.parameters, strict=True):
            assert torch.allclose(p.tensor, z * share, rtol=1e-6, atol=1e-7)
    assert zm.inspect().engine == engine


class Unusual(nn.Module):
    """Tensors of 0, 1, 3 and 4 dimensions, one without elements and one matrix without rows."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "scalar": (),
            "empty": (0,),
            "vector": (3,),
            "rowless": (0, 3),
            "stack": (2, 3, 2),
            "kernel": (2, 1, 2, 2),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def unusual_loss(model, inputs):
    return inputs["x"].mean(-1) * model.scalar + sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("direction", ["lowrank(2)", "sparse(0.5)", "cone"])
def test_tensors_of_any_number_of_dimensions(direction) -> None:
    zm = zowrap.zo_wrap(
        Unusual(), "zo_sgd", lr=0.5, direction=direction, loss_fn=unusual_loss, engine="eager", eps=1e-2
    )
    (stream,) = zm.directions.queries
    expected = []
    directions = [zm.engine.direction(stream, i) for i in range(len(zm.parameters))]
    for sign in (1e-2, -1e-2):
        other = Unusual()
        for p, z in zip(other.parameters(), directions, strict=True):
            p.data += sign * z
        expected.append(unusual_loss(other, {"x": torch.ones(2, 3)}).mean().item())
    result = zm.step(x=torch.ones(2, 3))
    assert torch.allclose(result.losses, torch.tensor(expected), rtol=1e-5) and not result.skipped
    for p, z in zip(zm.parameters, directions, strict=True):
        assert torch.allclose(p.tensor, 1 - 0.5 * result.projected_grad * z, rtol=1e-4, atol=1e-5), p.name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_agree_between_engines(dtype) -> None:
    """float64 keeps its digits through the thin products; 16-bit weights are rounded after them, not before."""
    losses = []
    for engine in ENGINES:
        torch.manual_seed(0)
        zm = zowrap.zo_wrap(
            Odd().to(dtype), "zo_sgd", eps=1e-2, direction="lowrank(2)", loss_fn=odd_loss, engine=engine
        )
        zm.accumulate(**odd_batch())
        losses.append(zm.peek()[0])
        zm.update(projected_grad=torch.tensor(1.0))
        assert all(p.tensor.dtype == dtype for p in zm.parameters) and zm.inspect().engine == engine
    assert torch.allclose(*losses, rtol=1e-6 if dtype == torch.float64 else 1e-2)
