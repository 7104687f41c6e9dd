"""The compiled engine equals the eager oracle: losses, updates, every law, odd shapes, ties, 16 bit."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.devices import gpu_generator
from tests.support.families import DataDependent, batch, make, snapshot, unchanged
from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from zowrap.compiler import inductor
from zowrap.errors import ZOCaptureError, ZOError

ONE_OF_EACH = ("opt", "llama", "bert", "t5")  # decoder, decoder with tied head, encoder, encoder–decoder


@pytest.fixture(scope="module", params=slow_except(["llama"], ONE_OF_EACH))
def pair(request):
    """The same model under both engines, compiled once for the module's tests."""
    name = request.param
    eager = zowrap.zo_wrap(make(name), "zo_sgd", lr=1e-3, engine="eager")
    compiled = zowrap.zo_wrap(make(name), "zo_sgd", lr=1e-3, engine="compiled")
    compiled.step(**batch(name, 8, 16))
    eager.step(**batch(name, 8, 16))
    return name, eager, compiled


def reset(*wrapped) -> None:
    for zm in wrapped:
        fresh = snapshot(make_like(zm))
        zm.model.load_state_dict(fresh)
        zm.step_count = 0


def make_like(zm):
    kind = type(zm.model).__name__
    return make(
        {"OPTForCausalLM": "opt", "LlamaForCausalLM": "llama", "T5ForConditionalGeneration": "t5"}.get(kind, "bert")
    )


def test_losses_agree_at_every_batch_size_and_length(pair) -> None:
    name, eager, compiled = pair
    reset(eager, compiled)
    for rows, length in [(8, 16), (3, 7), (1, 16), (1, 3), (5, 33), (2, 2)]:
        inputs = batch(name, rows, length, seed=rows)
        for zm in (eager, compiled):
            zm.discard()
            zm.accumulate(**inputs)
        a, b = eager.peek()[0], compiled.peek()[0]
        assert torch.allclose(a, b, rtol=1e-5, atol=0), (rows, length)
        assert torch.allclose(eager.loss(**inputs), compiled.loss(**inputs), rtol=1e-5, atol=0)


def test_fed_the_same_projected_gradients_the_weights_agree(pair) -> None:
    """50 steps at an η that moves the weights by at least 1 %: ‖w_c − w_e‖ ≤ 1e-5 · ‖w_e − w_0‖ per tensor."""
    _, eager, compiled = pair
    reset(eager, compiled)
    start = {p.name: p.tensor.clone() for p in eager.parameters}
    draw = torch.Generator().manual_seed(0)
    for zm in (eager, compiled):
        zm.lr = 1e-2
    for _ in range(50):
        g = torch.randn((), generator=draw)
        eager.update(projected_grad=g)
        compiled.update(projected_grad=g)
    for p_e, p_c in zip(eager.parameters, compiled.parameters, strict=True):
        moved = (p_e.tensor - start[p_e.name]).norm()
        assert moved >= 1e-2 * start[p_e.name].norm()
        assert (p_c.tensor - p_e.tensor).norm() <= 1e-5 * moved, p_e.name
    for zm in (eager, compiled):
        zm.lr = 1e-3


@pytest.mark.slow
def test_a_batch_may_be_views_of_larger_tensors() -> None:
    zm = zowrap.zo_wrap(make("bert"), "zo_sgd", engine="compiled")
    plain = batch("bert", 4, 9)
    wide = {name: torch.stack([v, v], -1) for name, v in plain.items()}
    expected, got = (zm.loss(**given) for given in (plain, {name: v[..., 0] for name, v in wide.items()}))
    assert torch.equal(got, expected)


def test_nothing_recompiles(pair) -> None:
    name, _, compiled = pair
    compiled.step(**batch(name, 8, 16))
    before, kernels_before = compiled.inspect().compile_count, inductor.compile_count
    for step, (rows, length) in enumerate([(8, 16), (1, 16), (4, 9), (7, 31)]):
        compiled.lr, compiled.eps = 1e-3 / (step + 1), 1e-3 * (step + 1)
        compiled.step(**batch(name, rows, length, seed=step))
    compiled.lr, compiled.eps = 1e-3, 1e-3
    assert compiled.inspect().compile_count == before
    assert inductor.compile_count == kernels_before


def test_the_compiled_step_calls_no_original_module(pair, monkeypatch) -> None:
    name, _, compiled = pair
    for module in compiled.job.loss.modules():
        monkeypatch.setattr(module, "forward", lambda *a, **k: pytest.fail("a module was called"))
    compiled.step(**batch(name, 4, 9))


def test_loss_and_failed_steps_leave_weights_bitwise(pair) -> None:
    name, eager, compiled = pair
    for zm in (eager, compiled):
        before = snapshot(zm.model)
        zm.loss(**batch(name, 4, 9))
        assert unchanged(zm.model, before)
        zm.accumulate(**batch(name, 4, 9))
        assert unchanged(zm.model, before)
        zm.discard()
        bad = batch(name, 4, 9)
        bad["input_ids"] = bad["input_ids"] + 10_000
        with pytest.raises((IndexError, RuntimeError)):
            zm.step(**bad)
        assert unchanged(zm.model, before)
        bad = batch(name, 4, 9)
        bad["labels"] = bad["labels"] + 10_000
        if name != "t5":  # whose labels are also its decoder's inputs
            assert zm.step(**bad).skipped and unchanged(zm.model, before)
        result = zm.update(losses=torch.tensor([float("nan"), 1.0]))
        assert result.skipped and unchanged(zm.model, before)


def test_a_skipped_step_keeps_the_rule_state() -> None:
    zm = zowrap.zo_wrap(make("llama"), "meazo", engine="compiled")
    zm.update(projected_grad=torch.tensor(1.0))
    before, state = snapshot(zm.model), {k: v.clone() for k, v in zm.job.states[0].items()}
    for losses in ([float("inf"), 1.0], [1.0, float("nan")], [float("inf"), float("-inf")]):
        assert bool(zm.update(losses=torch.tensor(losses)).skipped)
    assert unchanged(zm.model, before)
    assert all(torch.equal(v, state[k]) for k, v in zm.job.states[0].items())
    assert not zm.update(losses=torch.tensor([1.0, 0.5])).skipped
    assert not unchanged(zm.model, before)


class Odd(nn.Module):
    """Shapes that tile nothing, a tied pair, a convolution (no cheap form), a transposed product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv1d(7, 7, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(7, 7) / 3)
        self.gain = nn.Parameter(torch.ones(7))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) * self.gain
        return self.head(torch.tanh(x @ self.mix))


def odd_loss(model: nn.Module, inputs: dict) -> Tensor:
    logits = model(inputs["ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), inputs["ids"].flatten())


def odd_batch(rows: int = 5, length: int = 6) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 13, (rows, length), generator=torch.Generator().manual_seed(rows))}


@pytest.mark.parametrize("direction", ["gaussian", "rademacher", "sphere", "unit_sphere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_perturbation_noise_is_update_noise_is_replay_noise(direction, dtype) -> None:
    """For odd shapes, ties and every law: what the probes added is what the update subtracts."""
    torch.manual_seed(0)
    zm = zowrap.zo_wrap(Odd().to(dtype), "zo_sgd", lr=1.0, direction=direction, loss_fn=odd_loss, engine="compiled")
    assert [p.name for p in zm.parameters] == ["embed.weight", "mix", "gain", "conv.weight", "conv.bias"] or len(
        zm.parameters
    ) == 5
    (query,) = zm.directions.queries
    oracle = zm.engine.eager
    for i, parameter in enumerate(zm.parameters):
        zeros = torch.zeros_like(parameter.tensor, dtype=torch.float32)
        one = torch.ones(1)
        (probe,) = torch.ops.zowrap.perturb(zeros, [], query.keys[i], query.scale, [], one, zm.engine.kernels.key)
        reference = oracle.direction(query, i)
        assert torch.equal(probe, reference)
        if parameter.tensor.ndim == 2:
            rows = torch.tensor([[0, 3], [2, 3]])
            args = (zeros, [], rows, query.keys[i], query.scale, [], one, zm.engine.kernels.key)
            assert torch.equal(torch.ops.zowrap.perturb_rows(*args)[0], reference[rows])
    if dtype == torch.float32:
        before = {p.name: p.tensor.detach().clone() for p in zm.parameters}
        for p in zm.parameters:
            p.tensor.data.zero_()
        result = zm.update(projected_grad=torch.tensor(-1.0))
        moved = [p.tensor.detach().clone() for p in zm.parameters]
        for i in range(len(moved)):
            assert torch.equal(moved[i], oracle.direction(query, i))
        for p in zm.parameters:
            p.tensor.data.copy_(before[p.name])
        zm.step_count = 0
        for p in zm.parameters:
            p.tensor.data.zero_()
        zm.replay(result.record())
        assert all(torch.equal(p.tensor, m) for p, m in zip(zm.parameters, moved, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"direction": "sphere", "queries": 3},
        {"direction": "rademacher", "estimator": "forward", "queries": 2},
        {"weight_decay": 0.1, "rule": zowrap.rules.zo_sgd(momentum=0.9)},
        {"rule": "meazo", "queries": 2, "blocks": ["embed*", "*"]},
    ],
    ids=["sphere q3", "forward q2", "momentum decay", "blocks"],
)
def test_engines_agree_for_odd_models(options) -> None:
    runs = []
    for engine in ("eager", "compiled"):
        torch.manual_seed(0)
        zm = zowrap.zo_wrap(Odd(), lr=1e-2, loss_fn=odd_loss, engine=engine, **{"rule": "zo_sgd", **options})
        start = {p.name: p.tensor.detach().clone() for p in zm.parameters}
        draw = torch.Generator().manual_seed(1)
        for _ in range(6):
            zm.accumulate(**odd_batch())
            losses = zm.peek()[0]
            zm.update(projected_grad=torch.randn(zm.job.queries, generator=draw))
        runs.append((zm, losses, start))
    (eager, losses_e, start), (compiled, losses_c, _) = runs
    assert torch.allclose(losses_e, losses_c, rtol=1e-5)
    for a, b in zip(eager.parameters, compiled.parameters, strict=True):
        moved = (a.tensor - start[a.name]).norm()
        assert (a.tensor - b.tensor).norm() <= 1e-5 * moved, a.name


@pytest.mark.slow
def test_tied_weights_are_one_parameter_and_stay_tied() -> None:
    model = make("llama")
    zm = zowrap.zo_wrap(model, engine="compiled")
    names = [p.name for p in zm.parameters]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    zm.step(**batch("llama", 4, 9))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


class Recurring(nn.Module):
    """One module under three names, and its weight in a module of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.layers = nn.ModuleList([self.first, self.first])
        self.last = nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


def recurring_loss(model: nn.Module, inputs: dict) -> Tensor:
    return model(inputs["x"]).square().mean(-1)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_shared_modules_are_perturbed_everywhere_and_left_as_they_were(engine) -> None:
    torch.manual_seed(0)
    model, inputs = Recurring(), {"x": torch.randn(4, 5)}
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-2, eps=0.1, loss_fn=recurring_loss, engine=engine)
    oracle = zm.engine if engine == "eager" else zm.engine.eager
    (query,), weight, before = zm.directions.queries, model.first.weight, snapshot(model)
    expected = []
    for sign in (0.1, -0.1):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for i, p in enumerate(other.parameters()):
                p += sign * oracle.direction(query, i)
        expected.append(recurring_loss(other, inputs).mean())
    zm.accumulate(**inputs)
    assert torch.allclose(zm.peek()[0], torch.stack(expected), rtol=1e-5)
    assert model.first.weight is weight and model.last.weight is weight and unchanged(model, before)
    zm.update()
    assert model.last.weight is weight and not unchanged(model, before)


def test_the_exact_slope_leaves_shared_modules_as_they_were() -> None:
    torch.manual_seed(0)
    model, inputs = Recurring(), {"x": torch.randn(4, 5)}
    zm = zowrap.zo_wrap(model, "zo_sgd", eps=1e-3, loss_fn=recurring_loss, engine="eager")
    weight, (query,) = model.first.weight, zm.directions.queries
    _, slopes, _ = zm.engine.derivative(inputs, query)
    assert model.first.weight is weight
    plus, minus = zm.engine.losses(inputs, query, torch.tensor([1e-3, -1e-3]))[0]
    assert torch.allclose(slopes, (plus - minus) / 2e-3, rtol=1e-2, atol=1e-4)


class Writing(nn.Module):
    """Writes to the weight of an embedding, to a small buffer and, if it has one, to a large buffer."""

    def __init__(self, max_norm: float | None, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4, max_norm=max_norm)
        self.head = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("table", torch.zeros(size))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.table += 1
        return self.head(self.embed(ids)).mean((1, 2))


@pytest.mark.parametrize("trainable", ["embed", "head"])
@pytest.mark.parametrize(
    ("written", "max_norm", "size"), [("embed.weight", 0.1, 8), ("table", None, 70_000), (None, None, 8)]
)
def test_a_forward_that_writes_to_the_model_is_undone_or_named(trainable, written, max_norm, size) -> None:
    model, inputs = Writing(max_norm, size), {"ids": torch.randint(0, 11, (3, 5))}
    zm = zowrap.zo_wrap(
        model, "zo_sgd", trainable=trainable, loss_fn=lambda m, b: m(b["ids"]), engine="eager", eps=1e-3
    )
    before = snapshot(model)
    for evaluate in (zm.loss, zm.accumulate):
        if written is None:
            evaluate(**inputs)
            assert unchanged(model, before)
        else:
            with pytest.raises(ZOError, match=rf"writes to {written} \(of shape"):
                evaluate(**inputs)
            assert not model.calls.any()


@pytest.mark.parametrize("options", [{}, {"queries": 3}, {"estimator": "population"}], ids=str)
def test_every_point_starts_from_the_same_buffers(options: dict) -> None:
    """A forward that uses what it counts would otherwise compare the points of a direction at different counts."""

    def loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return model(given["ids"]) * 0 + model.calls.sum() * (given["ids"][:, 0] * 0 + 1)

    zm = zowrap.zo_wrap(Writing(None, 8), "zo_sgd", loss_fn=loss, engine="eager", **options)
    result = zm.step(ids=torch.randint(0, 11, (3, 5)))
    assert result.losses.eq(3).all() and not zm.model.calls.any()


def test_training_mode_is_evaluated_without_dropout_and_restored() -> None:
    model = make("bert").train()
    model.bert.pooler.eval()
    flags = [m.training for m in model.modules()]
    for engine in ("eager", "compiled"):
        zm = zowrap.zo_wrap(model, engine=engine)
        assert zm.loss(**batch("bert", 4, 9)) == zm.loss(**batch("bert", 4, 9))
        assert [m.training for m in model.modules()] == flags


def data_dependent_loss(model: nn.Module, inputs: dict) -> Tensor:
    return model(inputs["x"]).square().mean()


@pytest.mark.parametrize("debug", [False, True])
def test_a_failed_capture_prints_nothing_of_torchs(debug, capfd, monkeypatch) -> None:
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    if debug:
        monkeypatch.setenv("ZOWRAP_DEBUG", "1")
    else:
        monkeypatch.delenv("ZOWRAP_DEBUG", raising=False)
    with pytest.warns(UserWarning, match="running eagerly"):
        zowrap.zo_wrap(DataDependent(), loss_fn=data_dependent_loss).step(x=torch.randn(4, 3))
    printed = capfd.readouterr()
    assert ("def forward" in printed.err) == debug and printed.out == ""
    assert debug or all(line.startswith("compiling the training step") for line in printed.err.splitlines())
    assert log.level == level and "print" not in vars(torch.export._trace)


def test_what_cannot_be_captured_falls_back_with_one_warning() -> None:
    zm = zowrap.zo_wrap(DataDependent(), loss_fn=data_dependent_loss)
    with pytest.warns(
        UserWarning, match="running eagerly, because the model branches on a number that depends on its param"
    ):
        zm.step(x=torch.randn(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zm.step(x=torch.randn(4, 3))
    report = zm.inspect()
    assert report.engine == "eager" and "branches on a number" in report.fallen_back
    with pytest.raises(ZOCaptureError, match="engine='compiled' was asked for"):
        zowrap.zo_wrap(DataDependent(), loss_fn=data_dependent_loss, engine="compiled").step(x=torch.randn(4, 3))


NO_COMPILER = """
import warnings, torch, zowrap
from tests.support.families import batch, make
zm = zowrap.zo_wrap(make("llama"), engine={engine!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        zm.step(**batch("llama", 2, 5)); zm.step(**batch("llama", 2, 5))
    except zowrap.ZOError as error:
        print("ERROR", error)
print([str(w.message) for w in caught if "eagerly" in str(w.message)], zm.step_count)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "compiled"])
def test_without_a_compiler(engine, tmp_path) -> None:
    """CXX points nowhere and nothing is cached: eager with one warning, or an error if compiled was asked for."""
    import os

    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER.format(engine=engine)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if engine is None:
        assert done.stdout.count("running eagerly") == 1 and "C++ compiler" in done.stdout
        assert done.stdout.rstrip().endswith(" 2")
    else:
        assert "ERROR engine='compiled' was asked for, but no working C++ compiler" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_wrong_token_id_is_an_error_also_below_the_active_block(engine) -> None:
    zm = zowrap.zo_wrap(make("llama"), blocks="layer", block_order="descending", engine=engine)
    inputs = batch("llama", 2, 5)
    zm.step(**inputs)
    inputs["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        zm.step(**inputs)


def test_the_tensors_of_a_model_are_looked_up_once_a_step_and_anew_at_the_next(monkeypatch) -> None:
    """Of a small model looking them up takes longer than evaluating one of many directions."""
    compile_nothing(monkeypatch)
    zm, inputs, calls = zowrap.zo_wrap(make("llama"), "zo_sgd", queries=3, engine="compiled"), batch("llama", 2, 5), []
    zm.step(**inputs)  # captures
    plain = zm.job.loss.named_buffers
    monkeypatch.setattr(zm.job.loss, "named_buffers", lambda **given: calls.append(1) or plain(**given))
    for step in range(1, 3):
        zm.step(**inputs)
        assert len(calls) == step
    before = zm.loss(**inputs).item()
    norm = zm.model.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(2 * norm.weight.detach())
    assert zm.loss(**inputs).item() != before


WRONG_INDICES = """
import torch, zowrap
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(2)

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))

FORMS = {
    "index": lambda t, b: t[b["ids"]],
    "index_select": lambda t, b: t.index_select(0, b["ids"].flatten()),
    "gather": lambda t, b: (b["x"] @ t[:8]).flatten(0, 1).gather(1, b["ids"].view(-1, 1)),
    "cross_entropy": lambda t, b: F.cross_entropy((b["x"] @ t[:8, :60]).mT, b["ids"], ignore_index=-7),
    "nll": lambda t, b: F.nll_loss((b["x"] @ t[:8]).flatten(0, 1), b["ids"].flatten()),
}
LEGAL = {"index": -1000, "cross_entropy": -7, "nll": -100}  # beside the numbers from 0 on
ENTRIES = {"gather": 64, "cross_entropy": 60, "nll": 64}
for name, form in FORMS.items():
    entries = ENTRIES.get(name, 1000)
    inputs = {"x": torch.ones(64, 60, 8), "ids": torch.arange(64 * 60).view(64, 60) % entries}
    inputs["ids"][5, 6] = LEGAL.get(name, 0)
    loss = lambda m, b: form(m.table, b).square().mean()
    compiled, eager = (zowrap.zo_wrap(Table(), loss_fn=loss, engine=e) for e in ("compiled", "eager"))
    for zm in (compiled, eager):
        zm.accumulate(**inputs)
    assert torch.allclose(compiled.peek()[0], eager.peek()[0], rtol=1e-5), name
    for wrong in (entries, -1001, -1):
        if wrong == -1 and name == "index":
            continue
        bad = {**inputs, "ids": inputs["ids"].clone()}
        bad["ids"][40, 7] = wrong
        try:
            compiled.step(**bad)
        except IndexError as error:
            assert f"index {wrong} is out of range" in str(error), error
        else:
            raise AssertionError((name, wrong))
print("alive")
"""


@pytest.mark.slow
def test_a_wrong_index_does_not_end_the_process() -> None:
    """With two threads an assertion of machine code would, whoever looks up: the model or its loss."""
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", WRONG_INDICES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip().endswith("alive"), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_int32_indices_give_the_same_losses(name) -> None:
    """After int64 ones, whose kernels are there already."""
    compiled, eager = (zowrap.zo_wrap(make("llama"), engine=engine, eps=0.1) for engine in ("compiled", "eager"))
    inputs = batch("llama", 4, 9)
    short = {**inputs, name: inputs[name].int()}
    for zm in (compiled, eager):
        zm.accumulate(**inputs)
        zm.discard()
        zm.accumulate(**short)
    assert torch.allclose(compiled.peek()[0], eager.peek()[0], rtol=1e-5, atol=0)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, **options) -> None:
        super().__init__()
        self.packed = packed
        self.embed = nn.Embedding(50, 8)
        self.layers = kind(8, 6, batch_first=True, **options)
        self.head = nn.LazyLinear(3)
        self(torch.zeros(2, 4, dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(ids),), 4), batch_first=True)
            return self.head(self.layers(x)[0].data).unflatten(0, (-1, len(ids))).mean(0)
        out, state = self.layers(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(out[:, -1]) + last.sum((0, 2)).unsqueeze(-1)


def recurrent_wrap(engine: str | None, *args, **options):
    torch.manual_seed(0)
    model = Recurrent(*args, **options)
    loss = lambda m, b: nn.functional.cross_entropy(m(b["ids"]), b["ids"][:, 0] % 3)  # noqa: E731
    return zowrap.zo_wrap(model, "zo_sgd", lr=1e-2, eps=0.1, loss_fn=loss, engine=engine)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "proj_size": 3}),
        (nn.GRU, {}),
        (nn.RNN, {"bias": False}),
    ],
)
def test_recurrent_layers_compile_once_for_every_size(kind, options) -> None:
    eager, compiled = (recurrent_wrap(engine, kind, **options) for engine in ("eager", "compiled"))
    for rows, length in [(8, 11), (3, 7), (1, 20)]:
        ids = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
        a, b = eager.step(ids=ids).losses, compiled.step(ids=ids).losses
        assert torch.allclose(a, b, rtol=1e-5), (rows, length)
    for name, value in eager.model.state_dict().items():
        assert torch.allclose(value, compiled.model.state_dict()[name], atol=1e-6), name
    assert len(compiled.engine.executables) == 1


def test_recurrent_layers_over_packed_sequences_run_eagerly() -> None:
    zm = recurrent_wrap(None, nn.GRU, packed=True)
    with pytest.warns(UserWarning, match="running eagerly, because torch.export cannot capture"):
        zm.step(ids=torch.zeros(2, 4, dtype=torch.int64))


class Broken(nn.Module):
    """Draws random numbers in evaluation mode, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.w * 1e-6 + torch.randn_like(x)


def test_random_models_draw_alike_at_both_points_and_are_not_compiled() -> None:
    zm = zowrap.zo_wrap(Broken(), loss_fn=lambda m, b: m(b["x"]).square().mean(-1))
    with pytest.warns(UserWarning, match="random numbers in evaluation mode"):
        result = zm.step(x=torch.zeros(64, 3))
    assert abs(result.projected_grad) < 1e-4  # independent draws would give about a hundred
    assert zm.model.calls == 0


def test_random_models_on_a_gpu_draw_alike_at_both_points_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device, drawn = torch.device("cuda", 1), gpu_generator(monkeypatch)

    def loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        drawn.position += 1
        return model(given["x"]).mean(-1) * 0 + drawn.position

    zm = zowrap.zo_wrap(nn.Linear(3, 3), loss_fn=loss, engine="eager")
    query = zm.directions.queries[0]
    monkeypatch.setattr(zm.job, "device", device)
    sums, _ = zm.engine.losses({"x": torch.zeros(2, 3)}, query, torch.tensor([1e-3, -1e-3]))
    assert torch.equal(sums, torch.ones(2, 2)) and drawn.devices == {device}


def test_a_wrong_first_batch_does_not_disable_the_compiled_engine() -> None:
    zm = zowrap.zo_wrap(Odd(), loss_fn=odd_loss)
    with pytest.raises(KeyError):
        zm.step(wrong=torch.ones(2, 3))
    zm.step(**odd_batch())
    assert zm.inspect().engine == "compiled"


@pytest.mark.parametrize("direction", ["gaussian", "sphere"])
def test_a_kernel_that_cannot_be_compiled_leaves_no_half_written_step(direction, monkeypatch) -> None:
    from zowrap.compiler import inductor
    from zowrap.ops import loops

    real, calls = inductor.compile_function, []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ZOCaptureError("the C++ compiler failed")
        return real(*args)

    monkeypatch.setattr(loops, "compile_function", second_fails)
    models = []
    for engine in ("eager", None):
        torch.manual_seed(0)
        rule = zowrap.rules.zo_sgd(momentum=0.123)  # a rule whose kernels no other test has compiled
        options = {"weight_decay": 0.1, "direction": direction, "loss_fn": odd_loss, "engine": engine}
        zm = zowrap.zo_wrap(Odd(), rule, lr=1e-2, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zm.update(projected_grad=torch.tensor(1.0))
        models.append(zm.model)
    assert zm.inspect().engine == "eager"
    assert unchanged(models[1], snapshot(models[0]))


def test_directions_of_the_same_name_do_not_share_kernels() -> None:
    from zowrap.step.directions import Direction

    moved = []
    for law in ("gaussian", "rademacher"):
        torch.manual_seed(0)
        zm = zowrap.zo_wrap(
            Odd(), "zo_sgd", lr=1.0, direction=Direction("mine", law), loss_fn=odd_loss, engine="compiled"
        )
        before = zm.model.mix.detach().clone()
        zm.update(projected_grad=torch.tensor(1.0))
        moved.append((zm.model.mix.detach() - before).abs())
    assert torch.allclose(moved[1], torch.ones(7, 7), atol=1e-5) and not torch.allclose(moved[0], moved[1], atol=1e-2)


class Strided(nn.Module):
    """Convolutions with strides over pictures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((1, 2, 3))


@pytest.mark.parametrize("takes", [3, 5])
def test_a_program_that_the_compiler_refuses_is_captured_with_fewer_open_sizes(takes, monkeypatch) -> None:
    """Those of the pictures are fixed first, and the number of rows only where that is refused too."""
    from zowrap.engines import compiled as compiled_engine

    compile_nothing(monkeypatch)
    interpret = compiled_engine.compile_regions

    def refuse(program, *args):
        if program.freedom < takes:
            raise inductor.RefusedProgram("the compiler refused the captured program")
        return interpret(program, *args)

    monkeypatch.setattr(compiled_engine, "compile_regions", refuse)
    eager, zm = (
        zowrap.zo_wrap(Strided(), "zo_sgd", loss_fn=lambda m, b: m(b["x"]), engine=engine, eps=1e-2)
        for engine in ("eager", "compiled")
    )
    for shape in [(4, 3, 16, 16), (3, 3, 16, 16), (4, 3, 20, 16), (4, 3, 16, 16)]:
        inputs = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        for each in (eager, zm):
            each.discard()
            each.accumulate(**inputs)
        assert torch.allclose(eager.peek()[0], zm.peek()[0], rtol=1e-5)
    (programs,) = zm.engine.captures.by_kind.values()
    assert {program.freedom for program in programs} == {takes}
    assert len(programs) == (2 if takes == 3 else 3)


def test_a_program_that_no_freedom_helps_is_refused_once(monkeypatch) -> None:
    from zowrap.engines import compiled as compiled_engine

    tried = []

    def refuse(program, *args):
        tried.append(program.freedom)
        raise inductor.RefusedProgram("the compiler refused the captured program")

    monkeypatch.setattr(compiled_engine, "compile_regions", refuse)
    zm = zowrap.zo_wrap(Strided(), "zo_sgd", loss_fn=lambda m, b: m(b["x"]))
    with pytest.warns(UserWarning, match="running eagerly, because the compiler refused"):
        zm.step(x=torch.randn(4, 3, 16, 16))
    assert tried == [0, 3, 5]
