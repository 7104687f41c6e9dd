"""bfloat16 weights learn at steps far below their resolution: stochastic rounding does, round-to-nearest does not.

And so do float32 masters; and what the direction really evaluated is.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import zowrap
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.model.zo_model import ZOModel
from zowrap.numerics import rounding
from zowrap.step.arithmetic import evaluated_direction
from zowrap.training.checkpoint import load_checkpoint
from zowrap.training.run_folder import Run

DIMENSION, STEPS, LR, EPS = 24, 500, 4e-4, 0.05


class Point(nn.Module):
    """f(w) = ½ Σ (w − w*)², a quarter away from its minimum in every coordinate; weights in [0.5, 1)."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        start = torch.rand(DIMENSION, generator=draw) * 0.2 + 0.7
        away = torch.where(torch.rand(DIMENSION, generator=draw) < 0.5, -0.15, 0.15)
        self.register_buffer("minimum", start + away)
        self.w = nn.Parameter(start.to(dtype))


def distance(model: nn.Module, inputs: dict) -> torch.Tensor:
    return 0.5 * (model.w.float() - model.minimum).square().sum() * inputs["one"]


def train(dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """Final loss, and the median size of a single element's step in units of a bfloat16 ulp of the median weight."""
    zm = zowrap.zo_wrap(Point(dtype, seed), "zo_sgd", lr=LR, eps=EPS, seed=seed, loss_fn=distance, engine="eager")
    sizes = []
    for _ in range(STEPS):
        (query,) = zm.directions.queries
        z = zm.engine.direction(query, 0)
        result = zm.step(one=torch.ones(()))
        sizes.append((LR * result.projected_grad * z).abs())
    ulp = 2.0**-8  # of bfloat16 in [0.5, 1)
    return zm.loss(one=torch.ones(())).item(), torch.cat(sizes).median().item() / ulp


@pytest.mark.slow
def test_bfloat16_reaches_the_float32_loss(monkeypatch) -> None:
    full = [train(torch.float32, seed)[0] for seed in range(3)]
    runs = [train(torch.bfloat16, seed) for seed in range(3)]
    assert all(size <= 1 / 8 for _, size in runs)
    spread = max(full) - min(full)
    start = 0.5 * DIMENSION * 0.15**2
    mean_full, mean_stochastic = sum(full) / 3, sum(loss for loss, _ in runs) / 3
    assert mean_full < 0.9 * start
    assert abs(mean_stochastic - mean_full) <= spread
    monkeypatch.setattr(rounding, "round_stochastically", lambda value, bits, dtype: value.to(dtype))
    nearest = [train(torch.bfloat16, seed)[0] for seed in range(3)]
    assert sum(nearest) / 3 > mean_full + 2 * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_engines_round_the_same_way(dtype) -> None:
    models = []
    for engine in ("eager", "compiled"):
        zm = zowrap.zo_wrap(Point(dtype, 0), "zo_sgd", lr=LR, eps=EPS, loss_fn=distance, engine=engine)
        for g in (1.0, -0.3, 2.5):
            zm.update(projected_grad=torch.tensor(g))
        models.append(zm.model.w.detach().clone())
        assert zm.model.w.dtype == dtype
    assert torch.equal(*models)


def test_rule_state_is_float32_whatever_the_weights() -> None:
    zm = zowrap.zo_wrap(Point(torch.bfloat16, 0), zowrap.rules.zo_sgd(momentum=0.9), loss_fn=distance, engine="eager")
    assert all(v.dtype == torch.float32 for v in zm.state_dict().values() if isinstance(v, torch.Tensor))


# --- float32 masters --------------------------------------------------------------------------------------------------

RULES = [rules.zo_sgd(lr=LR), rules.zo_adam(lr=1e-3)]


def wrap(rule: rules.Rule, dtype: torch.dtype = torch.bfloat16, engine: str = "eager", **options) -> ZOModel:
    return zowrap.zo_wrap(Point(dtype, 0), rule, eps=EPS, loss_fn=distance, engine=engine, **options)


def moved(zm: ZOModel) -> ZOModel:
    for g in (1.0, -0.3, 2.5):
        zm.update(projected_grad=torch.tensor(g))
    return zm


def master_of(zm: ZOModel) -> torch.Tensor:
    return zm.state_dict()["slots/master/w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_master_moves_as_a_float32_weight_and_the_weight_is_its_nearest(rule, dtype) -> None:
    half, full = wrap(rule, dtype, masters=True, weight_decay=0.1), wrap(rule, torch.float32, weight_decay=0.1)
    with torch.no_grad():
        full.model.w.copy_(half.model.w.float())
    assert torch.equal(master_of(moved(half)), moved(full).model.w)
    assert torch.equal(half.model.w, full.model.w.to(dtype))
    assert not torch.equal(half.model.w.float(), full.model.w)


OPTIONS = {
    "masters": {"masters": True},
    "evaluated": {"along": "evaluated"},
    "both": {"masters": True, "along": "evaluated"},
}
# Each rule, each of the options and each dtype: every combination has kernels of its own to compile.
BY_DEFAULT = [
    ("zo_sgd", "masters", torch.bfloat16),
    ("zo_sgd", "evaluated", torch.float16),
    ("zo_adam", "both", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("rule", "options", "dtype"),
    [
        pytest.param(
            *(rule, OPTIONS[options], dtype),
            id=f"{rule.name}-{options}-{dtype}",
            marks=() if (rule.name, options, dtype) in BY_DEFAULT else pytest.mark.slow,
        )
        for rule, options, dtype in itertools.product(RULES, OPTIONS, [torch.bfloat16, torch.float16])
    ],
)
def test_both_engines_agree_bitwise(rule, options, dtype) -> None:
    eager, compiled = (moved(wrap(rule, dtype, engine, **options)) for engine in ("eager", "compiled"))
    assert torch.equal(eager.model.w, compiled.model.w)
    states = eager.state_dict(), compiled.state_dict()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
    assert compiled.inspect().engine == "compiled"


def test_masters_keep_steps_that_are_a_thousandth_of_a_last_place() -> None:
    zm = wrap(rules.zo_sgd(lr=1e-6), masters=True)
    before, weights = master_of(zm), zm.model.w.clone()
    moved(zm)
    assert torch.equal(zm.model.w, weights)
    assert (master_of(zm) != before).float().mean() > 0.9


def test_a_resumed_run_with_masters_is_bitwise_the_whole_one(tmp_path) -> None:
    whole = wrap(rules.zo_adam(lr=1e-3), masters=True)
    inputs = {"one": torch.ones(())}
    for _ in range(3):
        whole.step(**inputs)
    checkpoint = Run(tmp_path).save_checkpoint(3, whole, {})
    resumed = wrap(rules.zo_adam(lr=1e-3), masters=True)
    load_checkpoint(checkpoint, resumed)
    for zm in (whole, resumed):
        zm.step(**inputs)
    assert torch.equal(whole.model.w, resumed.model.w)
    assert torch.equal(master_of(whole), master_of(resumed))
    with pytest.raises(ZOError, match="master"):
        wrap(rules.zo_adam(lr=1e-3)).load_state_dict(whole.state_dict())


def test_a_weight_written_from_elsewhere_is_its_own_master() -> None:
    zm = moved(wrap(rules.zo_sgd(lr=LR), masters=True))
    with torch.no_grad():
        zm.model.w[:3] = 5.0
    kept = master_of(zm)[3:]
    zm.lr = 0.0
    zm.update(projected_grad=torch.tensor(1.0))
    assert torch.equal(zm.model.w[:3].float(), torch.full((3,), 5.0))
    assert torch.equal(master_of(zm), torch.cat([torch.full((3,), 5.0), kept]))


def test_masters_are_counted_and_named() -> None:
    report = wrap(rules.zo_sgd(lr=LR), masters=True, along="evaluated").inspect()
    assert report.state_bytes == 4 * DIMENSION
    assert report.moves[0][3] == "to the nearest, from a float32 master, along the direction evaluated"


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            {"dtype": torch.float32, "masters": True},
            "masters=True is for 16-bit weights, and what moves here is float32",
        ),
        ({"dtype": torch.float32, "along": "evaluated"}, "along='evaluated' is for 16-bit weights"),
        ({"along": "evaluate"}, "did you mean 'evaluated'"),
        ({"along": "evaluated", "direction": "lowrank(1)"}, "has no such differences"),
        ({"along": "evaluated", "estimator": "forward_gradient"}, "has no such differences"),
    ],
)
def test_what_cannot_be_is_refused(options, problem) -> None:
    with pytest.raises(ZOError, match=problem):
        wrap(rules.zo_sgd(lr=LR), **options)


class Mixed(Point):
    """A 16-bit matrix beside a norm's gain in float32, as many checkpoints have them."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16, 0)
        self.gain = nn.Parameter(torch.full((DIMENSION,), 0.9))


def mixed(engine: str = "eager", **options) -> ZOModel:
    return zowrap.zo_wrap(Mixed(), rules.zo_adam(lr=1e-3), eps=EPS, loss_fn=distance, engine=engine, **options)


def test_float32_weights_beside_16_bit_ones_have_no_master() -> None:
    zm = mixed(masters=True, along="evaluated")
    assert [name for name in zm.state_dict() if "/master/" in name] == ["slots/master/w"]
    assert zm.inspect().state_bytes == mixed().inspect().state_bytes + 4 * DIMENSION
    assert [rounding for *_, rounding in zm.inspect().moves] == [
        "to the nearest, from a float32 master, along the direction evaluated", "exact"
    ]  # fmt: skip
    moved(zm)
    exact = moved(mixed())  # of float32 weights, masters and the direction evaluated change nothing
    assert torch.equal(zm.model.gain, exact.model.gain)


def test_both_engines_agree_on_mixed_weights_and_a_state_is_taken(tmp_path) -> None:
    eager, compiled = (moved(mixed(engine, masters=True)) for engine in ("eager", "compiled"))
    for name, value in eager.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, compiled.state_dict()[name]), name
    other = mixed(masters=True)
    other.load_state_dict(eager.state_dict())
    assert torch.equal(master_of(other), master_of(eager)) and compiled.inspect().engine == "compiled"


def test_a_state_of_another_direction_of_updates_is_refused() -> None:
    state = moved(wrap(rules.zo_sgd(lr=LR))).state_dict()
    with pytest.raises(ZOError, match="saved with along='drawn', the model is wrapped with 'evaluated'"):
        wrap(rules.zo_sgd(lr=LR), along="evaluated").load_state_dict(state)


# --- the direction evaluated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [-1.0, 0.0])
def test_the_evaluated_direction_is_the_difference_of_the_points(dtype, other) -> None:
    draw = torch.Generator().manual_seed(1)
    w, z = torch.randn(1000, generator=draw).to(dtype), torch.randn(1000, generator=draw)
    eps = torch.tensor(2.0**-9)
    plus, minus = ((w.float() + c * eps * z).to(dtype).float() for c in (1.0, other))
    found = evaluated_direction(w, z, eps, other)
    assert torch.equal(found, (plus - minus) / ((1 - other) * eps))
    assert not torch.equal(found, z)
    assert evaluated_direction(w, z, eps, None) is z
    assert evaluated_direction(w.float(), z, eps, other) is not None and torch.equal(
        evaluated_direction(w.float(), z, eps, other), z
    )


def test_weights_that_an_evaluation_cannot_move_stay() -> None:
    """ε far below half a last place: every point is θ itself, and nothing is known of any direction."""
    for along in ("drawn", "evaluated"):
        zm = wrap(rules.zo_sgd(lr=0.1), along=along)
        zm.eps = 1e-6
        before = zm.model.w.clone()
        moved(zm)
        assert torch.equal(zm.model.w, before) == (along == "evaluated")
