"""Every fast path against the eager oracle, matrices cut into many chunks, and nothing written but by the update.

Nothing is compiled here, so that many models, directions, dtypes and rules can be tried: what is compared is passes,
operators and the arithmetic of the kernels. That compiled code computes the same is for tests/engines/test_compiled.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import batch, make, snapshot, unchanged
from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from zowrap.engines import captures
from zowrap.errors import ZOCaptureError, ZOError
from zowrap.loss.module import token_losses
from zowrap.ops import scratch
from zowrap.step import blocks


class Plain(nn.Module):
    """Layers as most models have them, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(61, 24), nn.LayerNorm(24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.head = nn.Linear(24, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.norm(x)))
        return self.head(x)


class Turned(nn.Module):
    """Matrices stored as ``[inputs, outputs]``, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 24)
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(24, 24) / 5) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for w in self.layers:
            x = x + torch.tanh(torch.addmm(self.bias, x.flatten(0, 1), w).view_as(x))
        return nn.functional.linear(x, self.embed.weight)


def words_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    sums, counts = token_losses(model(inputs["input_ids"]), inputs["labels"])
    return sums / counts.clamp(min=1)


def words(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


MODELS = {"plain": Plain, "turned": Turned}
OPTIONS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "rademacher, one side at a time": {"direction": "rademacher", "memory": "sequential"},
    "sphere, three queries": {"direction": "sphere", "queries": 3},
    "sparse": {"direction": "sparse(0.5)"},
    "low rank": {"direction": "lowrank(2)"},
    "one block": {"blocks": ["layers.0", "layers.1", "*"], "block_order": "random"},
    "population": {"estimator": "population"},
    "grzo": {"estimator": "grzo"},
    "population, matrices alone": {"estimator": "population", "trainable": lambda name, tensor: tensor.ndim == 2},
    "population, vectors alone": {"estimator": "population", "trainable": lambda name, tensor: tensor.ndim == 1},
    "zo_adam": {"rule": "zo_adam"},
    "conmezo": {"rule": "conmezo"},
    "hizoo": {"rule": "hizoo"},
    "fzoo": {"rule": "fzoo"},
    "meazo, decay": {"rule": "meazo", "weight_decay": 0.1},
    "masters": {"masters": True},
    "evaluated": {"along": "evaluated"},
}
SIXTEEN = ("masters", "evaluated")
CASES = [
    *((name, options, torch.float32) for name in MODELS for options in OPTIONS if options not in SIXTEEN),
    *(("turned", options, torch.bfloat16) for options in OPTIONS),
    *(("turned", options, torch.float64) for options in ("gaussian", "low rank", "population")),
]
# Mapping a program over the examples takes longer than all else here: each model and choice of tensors once.
POPULATIONS = [
    ("plain", "population", torch.float32),
    ("turned", "population, matrices alone", torch.float32),
    ("turned", "population, vectors alone", torch.bfloat16),
]


def is_slow(case: tuple[str, str, torch.dtype]) -> bool:
    return case[1].startswith("population") and case not in POPULATIONS


# Of a loss near 4: 16-bit activations are rounded in another order, and float64 must be float64 in its products.
LOSS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    monkeypatch.setattr(scratch, "CHUNK_ROWS", 8)
    monkeypatch.setattr(scratch, "LEAST_ELEMENTS", 8)


def wrap(name: str, engine: str, dtype: torch.dtype = torch.float32, **options: Any) -> zowrap.ZOModel:
    torch.manual_seed(0)
    given = {"rule": "zo_sgd", "lr": 1e-2, "eps": 1e-2, "engine": engine, "loss_fn": words_loss, **options}
    return zowrap.zo_wrap(MODELS[name]().to(dtype).eval(), **given)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [pytest.param(*case, marks=pytest.mark.slow if is_slow(case) else ()) for case in CASES],
    ids=str,
)
def test_the_fast_path_equals_the_oracle_and_writes_in_the_update_alone(
    name: str, options: str, dtype: torch.dtype
) -> None:
    oracle, fast = (wrap(name, engine, dtype, **OPTIONS[options]) for engine in ("eager", "compiled"))
    start = snapshot(oracle.model)
    for step in range(3):
        inputs, before = words(step), snapshot(fast.model)
        block = blocks.active(step, len(fast.job.blocks), fast.options.block_order, fast.seed)
        active = {n for i in fast.job.blocks[block].indices for n in fast.parameters[i].names}
        for zm in (oracle, fast):
            zm.accumulate(**inputs)
            zm.loss(**inputs)
        assert unchanged(fast.model, before), "an evaluation wrote to a weight"
        expected, losses = oracle.peek()[0], fast.peek()[0]
        assert torch.allclose(losses, expected, rtol=LOSS[dtype], atol=0)
        draw = torch.Generator().manual_seed(step)
        given: dict[str, Any] = {"projected_grad": torch.randn(fast.job.queries, generator=draw)}
        if expected.ndim == 2:
            given = {"projected_grad": torch.randn(3, generator=draw), "weights": torch.tensor([0.5, 0.3, 0.2])}
        for zm in (oracle, fast):
            zm.update(losses=expected, **given)
        assert all(torch.equal(t, before[n]) for n, t in fast.model.named_parameters() if n not in active)
        assert not unchanged(fast.model, before)
    assert fast.engine.executables and fast.engine.fallen_back is None
    for a, b in zip(oracle.parameters, fast.parameters, strict=True):
        moved = (a.tensor - start[a.names[0]]).double().norm()
        assert (a.tensor.double() - b.tensor.double()).norm() <= 1e-4 * moved + 1e-12, a.name


def test_products_of_float64_are_not_summed_in_less() -> None:
    """Chunk by chunk, whichever way the matrix lies; the noise itself is float32 in both engines."""
    x, w = torch.randn(5, 24, dtype=torch.float64), torch.randn(24, 24, dtype=torch.float64)
    zm = wrap("turned", "compiled", torch.float64)
    zm.update(projected_grad=torch.ones(()))
    key, nothing = torch.tensor([1, 2], dtype=torch.int32), torch.zeros(1)
    for transposed, expected in ((False, x @ w.t()), (True, x @ w)):
        (found,) = torch.ops.zowrap.perturb_linear(
            [x], w, [], key, torch.ones(()), [], nothing, transposed, zm.engine.kernels.key
        )
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


# --- blocks that no loss depends on ----------------------------------------------------------------------------------


def pooled(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The mean of the hidden states: the pooler takes no part."""
    return model.bert(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state.square().mean((1, 2))


@pytest.mark.parametrize("estimator", slow_except(["central"], ["central", "population"]))
def test_an_unused_block_has_equal_losses_and_the_others_stay_compiled(estimator) -> None:
    options = {"lr": 1e-2, "loss_fn": pooled, "blocks": "layer", "estimator": estimator}
    oracle, fast = (zowrap.zo_wrap(make("bert"), "zo_sgd", engine=engine, **options) for engine in ("eager", None))
    flat = 0
    for step in range(len(fast.job.blocks)):
        inputs = batch("bert", 3, 9, seed=step)
        expected, found = oracle.step(**inputs), fast.step(**inputs)
        assert torch.allclose(found.losses, expected.losses, rtol=1e-5)
        flat += torch.equal(found.losses[0], found.losses[1])
    assert flat >= 1 and fast.engine.fallen_back is None
    for a, b in zip(oracle.parameters, fast.parameters, strict=True):
        assert torch.allclose(a.tensor, b.tensor, atol=5e-5)  # losses' rounding, over 2ε


def test_a_model_whose_only_block_is_unused_says_so() -> None:
    zm = zowrap.zo_wrap(make("bert"), trainable="pooler", loss_fn=pooled, engine="compiled")
    with pytest.raises(ZOCaptureError, match="takes part in the loss"):
        zm.step(**batch("bert", 3, 9))


# --- batches ---------------------------------------------------------------------------------------------------------


def scaled(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(inputs["x"]).square().mean(-1) * inputs.get("factor", 1.0)


def linear(**options: Any) -> zowrap.ZOModel:
    torch.manual_seed(0)
    return zowrap.zo_wrap(nn.Linear(4, 3), "zo_sgd", lr=1e-2, loss_fn=scaled, **options)


def test_a_number_that_changes_with_every_batch_is_not_compiled_for_ever() -> None:
    zm = linear()
    for step in range(captures.MAX_KINDS):
        zm.step(x=torch.ones(2, 4), factor=0.5 + step)
    with pytest.warns(UserWarning, match="'factor' differs from batch to batch and is not a tensor"):
        zm.step(x=torch.ones(2, 4), factor=0.25)
    assert zm.engine.fallen_back is not None


@pytest.mark.parametrize("value", [["a", "b"], {"y": "a"}], ids=["list", "dict"])
def test_what_holds_several_values_runs_eagerly(value: Any) -> None:
    zm = linear()
    with pytest.warns(UserWarning, match="the batch's 'meta' is a (list|dict)"):
        zm.step(x=torch.ones(2, 4), meta=value)


def test_what_holds_tensors_is_compiled() -> None:
    zm = linear()
    zm.step(x=torch.ones(2, 4), meta={"y": torch.ones(2)})
    assert zm.engine.fallen_back is None


def test_lists_of_rows_are_for_the_models_own_loss() -> None:
    with pytest.warns(
        UserWarning, match="lists of dictionaries can only be compiled for a loss that the model computes"
    ):
        linear().step(x=torch.ones(2, 4), meta=[{"y": torch.ones(2)}, {"y": torch.ones(2)}])


# --- an update that is broken off ------------------------------------------------------------------------------------


def test_an_update_that_was_broken_off_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    zm, inputs = wrap("plain", "compiled", rule="zo_adam"), words(0)
    zm.step(**inputs)
    weights, state = snapshot(zm.model), zm.state_dict()
    written, update = [], zm.engine.kernels.update.write

    def third_is_interrupted(*given: Any, **named: Any) -> None:
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt
        update(*given, **named)

    zm.engine.kernels.update.write = third_is_interrupted
    with pytest.raises(KeyboardInterrupt):
        zm.step(**inputs)
    zm.engine.kernels.update.write = update
    assert not unchanged(zm.model, weights)
    calls = (zm.step, zm.loss, lambda **_: zm.state_dict(), lambda **_: zm.update(projected_grad=torch.ones(())))
    for call in calls:
        with pytest.raises(ZOError, match="update of step 1 was broken off"):
            call(**inputs)
    zm.model.load_state_dict(weights)
    zm.load_state_dict(state)
    zm.step(**inputs)
    other = wrap("plain", "compiled", rule="zo_adam")
    other.step(**inputs)
    other.step(**inputs)
    assert unchanged(zm.model, snapshot(other.model))


# --- rules that return other numbers ---------------------------------------------------------------------------------


def test_coefficients_are_float32_whatever_a_rule_returns() -> None:
    from zowrap.step.arithmetic import conclude

    rule = zowrap.rules.get("zo_sgd", lr=1e-2)
    zm = zowrap.zo_wrap(nn.Linear(2, 2), rule, loss_fn=scaled)
    job, scalars = zm.job, rule.scalars

    def other(state: Any, probe: Any, hyper: Any) -> Any:
        new, coefficients = scalars(state, probe, hyper)
        return new, {**coefficients, "first": probe.step == 0, "double": torch.ones((), dtype=torch.float64)}

    object.__setattr__(rule, "scalars", other)
    found = conclude(rule, job.project, job.states[0], torch.ones(2), job.hyper, torch.zeros(()))
    assert {value.dtype for value in found.coefficients.values()} == {torch.float32}
