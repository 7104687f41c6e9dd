"""``zo_wrap`` as a user meets it: options, accumulation, replay, resume, state."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import pytest
import torch
from torch import nn

import zowrap
import zowrap.engines.eager
from tests.support.families import batch, make, snapshot, unchanged
from tests.support.slow import slow_except
from zowrap import rules
from zowrap.errors import ZOError

ENGINES = ["eager", "compiled"]


def wrap(engine="eager", **options):
    return zowrap.zo_wrap(make("llama"), engine=engine, **{"rule": "meazo", "lr": 1e-3, **options})


def concatenate(batches):
    """Micro-batches of unequal lengths as one batch, padded."""
    length = max(b["input_ids"].shape[1] for b in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value) for b in batches])
        for name, value in fill.items()
    }


@pytest.mark.parametrize("engine", slow_except(["eager"], ENGINES))
def test_four_micro_batches_of_four_are_one_of_sixteen(engine) -> None:
    parts = [batch("llama", 4, length, seed=length) for length in (5, 9, 12, 17)]
    whole, split = wrap(engine), wrap(engine)
    whole.accumulate(**concatenate(parts))
    for part in parts:
        split.accumulate(**part)
    assert torch.allclose(whole.peek()[0], split.peek()[0], rtol=1e-5)
    means = torch.stack([(p.peek()[0]) for p in _each(engine, parts)]).mean(0)
    assert not torch.allclose(means, whole.peek()[0], rtol=1e-5)  # a mean of means is another number
    g = torch.tensor(0.37)
    whole.update(projected_grad=g)
    split.update(projected_grad=g)
    assert unchanged(split.model, snapshot(whole.model))


def _each(engine, parts):
    for part in parts:
        zm = wrap(engine)
        zm.accumulate(**part)
        yield zm


MOMENTUM = {"rule": rules.zo_sgd(momentum=0.9), "queries": 2, "direction": "sphere"}


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        pytest.param({}, "eager", id="meazo-eager"),
        pytest.param({}, "compiled", id="meazo-compiled"),
        pytest.param(MOMENTUM, "eager", id="momentum-eager"),
        pytest.param(MOMENTUM, "compiled", id="momentum-compiled", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted_bitwise(options, engine) -> None:
    """State through JSON and tensors, weights through a state dict: the rest of the run is the same bits."""
    whole = wrap(engine, **options)
    for step in range(6):
        if step == 3:
            weights, state = snapshot(whole.model), copy.deepcopy(whole.state_dict())
        whole.step(**batch("llama", 4, 9, seed=step))
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = json.loads(json.dumps({k: v for k, v in state.items() if k not in tensors}))
    resumed = wrap(engine, **options)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict({**tensors, **rest})
    assert resumed.step_count == 3
    for step in range(3, 6):
        resumed.step(**batch("llama", 4, 9, seed=step))
    assert unchanged(resumed.model, snapshot(whole.model))
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items() if k in tensors)


@pytest.mark.parametrize("engine", ENGINES)
def test_replayed_journal_gives_the_same_bits(engine) -> None:
    original, records = wrap(engine, weight_decay=0.01), []
    for step in range(4):
        original.lr = 1e-3 / (step + 1)
        records.append(json.loads(json.dumps(original.step(**batch("llama", 4, 9, seed=step)).record())))
    replayed = wrap(engine, weight_decay=0.01)
    for record in records:
        replayed.replay(record)
    assert unchanged(replayed.model, snapshot(original.model))
    with pytest.raises(ZOError, match="stands at step 4"):
        replayed.replay(records[0])
    with pytest.raises(ZOError, match="cannot be replayed"):
        replayed.replay({"step": 4, "seed": 0})


def test_results_are_tensors_of_the_promised_shapes() -> None:
    one = wrap().step(**batch("llama", 4, 9))
    assert one.loss.shape == () and one.projected_grad.shape == () and one.skipped.shape == ()
    assert one.loss == one.losses.mean() and one.losses.shape == (2,)
    three = wrap(queries=3).step(**batch("llama", 4, 9))
    assert three.projected_grad.shape == (3,) and three.losses.shape == (6,)
    forward = wrap(queries=3, estimator="forward").step(**batch("llama", 4, 9))
    assert forward.losses.shape == (4,)


def test_the_projected_gradient_is_the_directional_derivative() -> None:
    zm = zowrap.zo_wrap(make("llama").double(), "zo_sgd", eps=1e-4, engine="eager", loss_fn=_own_loss)
    (query,) = zm.directions.queries
    inputs = batch("llama", 4, 9)
    z = {f"model.{p.names[0]}": zm.engine.direction(query, i).double() for i, p in enumerate(zm.parameters)}
    at = {f"model.{p.names[0]}": p.tensor.detach() for p in zm.parameters}

    def loss(parameters):
        sums, weights = torch.func.functional_call(zm.job.loss.eval(), parameters, (inputs,))
        return sums.sum() / weights.sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(loss, (at,), (z,))
        assert zm.step(**inputs).projected_grad.item() == pytest.approx(slope.item(), rel=2e-2, abs=2e-3)


def _own_loss(model, inputs):
    return model(**inputs, use_cache=False).loss


def test_descends() -> None:
    zm = wrap(lr=3e-3)
    inputs = batch("llama", 8, 12)
    before = zm.loss(**inputs)
    for _ in range(150):
        zm.step(**inputs)
    assert zm.loss(**inputs) < before - 0.1


def test_a_population_of_options_is_checked() -> None:
    model = make("llama")
    for options, words in [
        ({"rule": "meaz"}, "did you mean 'meazo'"),
        ({"rule": 3}, "rule must be a name"),
        ({"direction": "gausian"}, "did you mean 'gaussian'"),
        ({"estimator": "centre"}, "did you mean 'central'"),
        ({"engine": "compile"}, "did you mean 'compiled'"),
        ({"lr": 0.0}, "lr must be a positive"),
        ({"eps": float("inf")}, "eps must be a positive"),
        ({"eps": -1e-3}, "eps must be a positive"),
        ({"queries": 0}, "queries must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"blocks": "layers"}, "use 'layer'"),
        ({"trainable": ["nosuchname"]}, "nothing is left to tune"),
        ({"trainable": [""]}, "chosen by patterns"),
        ({"trainable": ["*mlp*", "nosuchname"]}, "nosuchname"),
        ({"blocks": []}, "blocks is empty"),
        ({"memory": "sequental"}, "did you mean 'sequential'"),
        ({"quantized": "scales"}, "this model has none"),
    ]:
        before = snapshot(model)
        with pytest.raises(ZOError, match=words):
            zowrap.zo_wrap(model, **options)
        assert unchanged(model, before)


def test_a_step_without_a_batch_says_so() -> None:
    zm = wrap()
    with pytest.raises(ZOError, match="needs a batch"):
        zm.step()
    with pytest.raises(ZOError, match="no rows"):
        zm.step(input_ids=torch.zeros(0, 4, dtype=torch.long), labels=torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ZOError, match="given by name"):
        zm.step((torch.ones(2), torch.ones(2)))
    with pytest.raises(ZOError, match="must be a torch module"):
        zowrap.zo_wrap("facebook/opt-125m")
    inputs = batch("llama", 4, 9)
    assert zm.loss(inputs) == zm.loss(**inputs)
    with pytest.raises(ZOError, match="nothing to apply"):
        zm.update()
    with pytest.raises(ZOError, match="2 evaluations"):
        zm.update(losses=torch.zeros(3))
    with pytest.raises(ZOError, match="1 queries"):
        zm.update(projected_grad=torch.zeros(2))


def test_state_of_another_rule_or_model_is_refused_and_changes_nothing() -> None:
    zm = wrap(rule=rules.zo_sgd(momentum=0.5))
    zm.update(projected_grad=torch.tensor(1.0))
    before = copy.deepcopy(zm.state_dict())
    with pytest.raises(ZOError, match="rule="):
        zm.load_state_dict(wrap().state_dict())
    other = zowrap.zo_wrap(make("opt"), rules.zo_sgd(momentum=0.5), engine="eager")
    with pytest.raises(ZOError, match="another model"):
        zm.load_state_dict(other.state_dict())
    after = zm.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


def test_seed_zero_is_a_seed() -> None:
    g = torch.tensor(1.0)
    runs = {}
    for seed in (0, 0, 1):
        zm = wrap(seed=seed)
        zm.update(projected_grad=g)
        runs.setdefault(seed, []).append(snapshot(zm.model))
    assert all(torch.equal(v, runs[0][1][k]) for k, v in runs[0][0].items())
    assert any(not torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())


def test_noise_does_not_depend_on_what_else_is_tunable_or_on_wrappers() -> None:
    """The same parameter gets the same direction alone, among others, and inside a wrapper module."""
    g = torch.tensor(1.0)
    alone, among = wrap(trainable=["layers.0.mlp.*"], rule="zo_sgd"), wrap(rule="zo_sgd")
    alone.update(projected_grad=g)
    among.update(projected_grad=g)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(alone.model.state_dict()[name], among.model.state_dict()[name])
    frozen = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(alone.model.state_dict()[frozen], make("llama").state_dict()[frozen])


def test_trainable_takes_a_predicate() -> None:
    zm = wrap(trainable=lambda name, tensor: tensor.ndim == 1)
    assert zm.parameters and all(p.tensor.ndim == 1 for p in zm.parameters)


@pytest.mark.parametrize("engine", slow_except(["eager"], ENGINES))
def test_adapters_move_and_the_base_stays(engine) -> None:
    peft = pytest.importorskip("peft")
    base = make("llama")
    before = snapshot(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-2, engine=engine)
    assert len(zm.parameters) == 8 and all("lora_" in p.name and "default" not in p.name for p in zm.parameters)
    first = zm.step(**batch("llama", 4, 9))
    second = zm.step(**batch("llama", 4, 9, seed=1))
    assert first.projected_grad != second.projected_grad
    after = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items() if "lora_" not in n}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_lr_and_eps_are_checked_when_set() -> None:
    zm = wrap()
    zm.lr = 0.0  # a schedule may end there
    with pytest.raises(ZOError, match="lr must be"):
        zm.lr = -1.0
    with pytest.raises(ZOError, match="eps must be"):
        zm.eps = 0.0


def test_inspect_says_what_moves() -> None:
    zm = wrap(trainable=["*mlp*"])
    report = zm.inspect()
    assert report.engine == "eager" and report.compile_count == 0 and report.program_hash is None
    assert report.elements + report.frozen == sum(p.numel() for p in zm.model.parameters())
    assert json.loads(json.dumps(report.as_dict()))["moves"][0]["name"].startswith("model.layers.0.mlp")
    assert "mlp" in str(report)


def test_compiled_inspect_shows_every_pass() -> None:
    zm = wrap("compiled")
    zm.step(**batch("llama", 4, 9))
    report = zm.inspect()
    assert report.compile_count == 1 and report.program_hash
    ((name, history),) = report.programs.items()
    assert [step for step, _ in history][-1] == "epilogue" and "2 points" in name


def test_every_option_has_its_reason_beside_it() -> None:
    text = inspect.getdoc(zowrap.zo_wrap)
    for name in inspect.signature(zowrap.zo_wrap).parameters:
        assert f"{name}:" in text or name == "model", name


class Tied(torch.nn.Module):
    """Two parameters on one storage: ``kind`` says how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.arange(9.0).reshape(3, 3) / 9)
        views = {"same": self.a.data, "transposed": self.a.data.t(), "part": self.a.data[1:]}
        self.b = torch.nn.Parameter(views[kind])


def tied_loss(model, inputs):
    return (inputs["x"] @ model.a).square().mean(-1) + (inputs["x"] @ model.b.t()).sum(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_on_one_storage_are_one(engine) -> None:
    zm = zowrap.zo_wrap(Tied("same"), "zo_sgd", lr=1e-2, loss_fn=tied_loss, engine=engine)
    assert len(zm.parameters) == 1 and zm.parameters[0].names == ("a", "b")
    (query,) = zm.directions.queries
    x = torch.ones(2, 3)
    z = zowrap.engines.eager.EagerEngine.direction(getattr(zm.engine, "eager", zm.engine), query, 0)
    expected = []
    for sign in (1e-3, -1e-3):
        other = Tied("same")
        other.a.data += sign * z
        expected.append(tied_loss(other, {"x": x}).mean().item())
    assert torch.allclose(zm.step(x=x).losses, torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tie_of_scattered_memory_stays_one(engine) -> None:
    """Weights that are not contiguous are laid anew, both names of them."""
    model = Tied("same")
    model.a.data = model.b.data = torch.arange(9.0).reshape(3, 3).t() / 9
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-2, loss_fn=tied_loss, engine=engine)
    zm.step(x=torch.ones(2, 3))
    assert model.a.data_ptr() == model.b.data_ptr() and model.a.is_contiguous()
    assert not torch.equal(model.b.data, torch.arange(9.0).reshape(3, 3).t() / 9)


@pytest.mark.parametrize("kind", ["transposed", "part"])
def test_overlapping_views_are_refused(kind) -> None:
    model = Tied(kind)
    with pytest.raises(ZOError, match="a and b share memory"):
        zowrap.zo_wrap(model, loss_fn=tied_loss)
    assert model.a.data_ptr() <= model.b.data_ptr() < model.a.data_ptr() + 36  # still tied


def test_layer_one_is_not_layer_ten() -> None:
    from zowrap.step.parameters import matches

    assert matches("layers.1", "model.layers.1.fc.weight") and not matches("layers.1", "model.layers.10.fc.weight")
    assert not matches("layers.1.*", "model.layers.10.fc1.weight")
    assert matches(r"layers\.\d+\.fc", "model.layers.10.fc1.weight") and matches("bias", "a.bias")


def test_a_state_is_a_snapshot() -> None:
    zm = wrap(rule=rules.zo_sgd(momentum=0.9))
    zm.update(projected_grad=torch.tensor(1.0))
    state = zm.state_dict()
    before = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    zm.update(projected_grad=torch.tensor(1.0))
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_a_weight_decay_without_a_matrix_to_decay_is_told() -> None:
    def told(trainable: list[str]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zowrap.zo_wrap(
                nn.Linear(2, 2), loss_fn=lambda m, b: m(b["x"]).sum(-1), weight_decay=0.1, trainable=trainable
            )
        return [str(each.message) for each in caught if "weight_decay does nothing" in str(each.message)]

    assert len(told(["bias"])) == 1 and not told(["bias", "weight"])


def test_another_weight_decay_is_refused_not_ignored() -> None:
    record = wrap(weight_decay=0.5).update(projected_grad=torch.tensor(1.0)).record()
    with pytest.raises(ZOError, match=r"weight_decay=0\.5"):
        wrap().replay(record)
    with pytest.raises(ZOError, match=r"weight_decay=0\.5"):
        wrap().load_state_dict(wrap(weight_decay=0.5).state_dict())


def test_what_no_block_holds_is_not_said_to_move() -> None:
    zm = wrap(blocks=["*mlp*"])
    assert all("mlp" in name for name, *_ in zm.inspect().moves)
    assert zm.inspect().frozen > 0


def test_float64_weights_keep_their_precision() -> None:
    model = torch.nn.Linear(3, 1).double()
    before = snapshot(model)
    zm = zowrap.zo_wrap(model, loss_fn=lambda m, b: m(b["x"]).square().mean(-1), engine="eager")
    zm.lr = 0.0
    zm.step(x=torch.ones(2, 3, dtype=torch.float64))
    assert unchanged(model, before)


@pytest.mark.parametrize("engine", slow_except(["eager"], ENGINES))
def test_means_over_label_tokens_accumulate_exactly(engine) -> None:
    """A loss function that returns the model's own mean: micro-batches still weigh by their label tokens."""
    parts = [batch("llama", 4, length, seed=length) for length in (5, 17)]
    options = {"loss_fn": _own_loss, "engine": engine}
    whole, split = (zowrap.zo_wrap(make("llama"), **options) for _ in range(2))
    whole.accumulate(**concatenate(parts))
    for part in parts:
        split.accumulate(**part)
    assert torch.allclose(whole.peek()[0], split.peek()[0], rtol=1e-5)


@pytest.mark.parametrize("engine", slow_except(["eager"], ENGINES))
def test_one_side_at_a_time_gives_the_same_losses(engine) -> None:
    inputs = batch("llama", 4, 9)
    both, one = wrap(engine), wrap(engine, memory="sequential")
    assert torch.allclose(both.step(**inputs).losses, one.step(**inputs).losses, rtol=1e-6)
