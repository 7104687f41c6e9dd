"""Populations: every example along its own direction, in one pair of forwards."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import zowrap
from tests.support.families import FAMILIES, batch, make, snapshot, unchanged
from zowrap.compiler import inductor
from zowrap.errors import ZOError
from zowrap.rules.estimators import get_estimator
from zowrap.storage.atomic import to_jsonable
from zowrap.training import journal

EPS = 1e-2


class Words(nn.Module):
    """An embedding tied to the head, a concatenation, and a small tensor that no thin product stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(12, 6)
        self.stack = nn.Parameter(torch.randn(2, 3, 6) / 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = torch.tanh(self.mix(torch.cat((x, x.cumsum(1)), -1))) * self.stack.sum((0, 1))
        return x @ self.embed.weight.t()


def words_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(inputs["ids"])
    return nn.functional.cross_entropy(logits.transpose(1, 2), inputs["ids"], reduction="none").mean(-1)


def words(rows: int = 4, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))}


def small(engine: str | None = "eager", rule="zo_sgd", **options):
    torch.manual_seed(0)
    options = {"lr": 0.1, "eps": EPS, "loss_fn": words_loss, "estimator": "population", **options}
    return zowrap.zo_wrap(Words(), rule, engine=engine, **options)


def tiny(**options):
    options = {"rule": "zo_sgd", "lr": 0.1, "eps": EPS, "engine": "eager", "estimator": "population", **options}
    return zowrap.zo_wrap(make("llama"), **options)


def directions(zm, examples: int) -> list[Tensor]:
    """z ``[examples, *shape]`` of every parameter, formed here from the factors."""
    query = zm.directions.population(range(examples))
    found = []
    for i, parameter in enumerate(zm.parameters):
        place = zm.job.layouts[query.block].places[i]
        left, right = place.left_of(query.factors), place.right_of(query.factors)
        z = left if right is None else torch.einsum("bir,bjr->bij", left, right)
        found.append(z.reshape(examples, *parameter.tensor.shape))
    return found


def test_a_population_is_a_loop_over_examples_with_directions_of_their_own() -> None:
    zm = small(direction="lowrank(2)")
    zs, inputs = directions(zm, 4), words()
    assert all(not torch.equal(z[0], z[1]) for z in zs)
    start = [p.tensor.detach().clone() for p in zm.parameters]
    expected = torch.zeros(2, 4)
    for b in range(4):
        for side, sign in enumerate((EPS, -EPS)):
            other = copy.deepcopy(zm.model)
            with torch.no_grad():
                for p, z in zip(other.parameters(), zs, strict=True):
                    p += sign * z[b]
            expected[side, b] = words_loss(other, {"ids": inputs["ids"][b : b + 1]}).item()
    result = zm.step(**inputs)
    assert torch.allclose(result.losses, expected, rtol=1e-5)
    slopes = (expected[0] - expected[1]) / (2 * EPS)
    assert result.projected_grad.shape == (4,) and torch.allclose(result.projected_grad, slopes, atol=1e-4)
    assert torch.equal(result.weights, torch.full((4,), 0.25)) and torch.allclose(result.loss, expected.mean())
    for p, w, z in zip(zm.parameters, start, zs, strict=True):
        estimate = torch.tensordot(result.weights * result.projected_grad, z, 1)
        assert torch.allclose(p.tensor, w - 0.1 * estimate, rtol=1e-5, atol=1e-6), p.name


def test_micro_batches_are_one_batch() -> None:
    """An example's direction is that of its place in the whole batch of the step."""
    inputs = batch("llama", 5, 8)
    whole, split = tiny(rule="meazo"), tiny(rule="meazo")
    one = whole.step(**inputs)
    for rows in (slice(0, 2), slice(2, 5)):
        split.accumulate(**{name: value[rows] for name, value in inputs.items()})
    other = split.update()
    assert torch.equal(one.losses, other.losses) and torch.equal(one.weights, other.weights)
    assert unchanged(split.model, snapshot(whole.model))


def test_examples_weigh_by_their_label_tokens() -> None:
    inputs = batch("llama", 3, 8)  # the second row is half padded
    inputs["labels"][2] = -100  # an example without labels counts nothing
    zm = tiny()
    result = zm.step(**inputs)
    counts = (inputs["labels"][:, 1:] != -100).sum(1).float()
    assert torch.allclose(result.weights, counts / counts.sum()) and result.weights[2] == 0 < result.weights[1]
    assert not result.skipped and result.projected_grad[2] == 0
    assert torch.allclose(result.loss, (result.losses * result.weights).sum(1).mean())
    central = zowrap.zo_wrap(make("llama"), engine="eager").loss(**inputs)
    assert float(result.loss) == pytest.approx(float(central), rel=0.05)


def test_a_batch_without_any_label_is_skipped() -> None:
    inputs = batch("llama", 3, 8)
    inputs["labels"][:] = -100
    zm = tiny(rule="meazo")
    before = snapshot(zm.model)
    result = zm.step(**inputs)
    assert result.skipped and unchanged(zm.model, before) and zm.job.states[0]["n"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_meazos_first_step_is_bounded(seed) -> None:
    """‖Σ w_b g_b z_b‖ / √(Σ (w_b g_b)²) ≤ √B · max ‖z_b‖, also where the slopes nearly cancel."""
    zm, examples = small(rule="meazo", lr=1.0), 6
    zs = directions(zm, examples)
    start = [p.tensor.detach().clone() for p in zm.parameters]
    draw = torch.Generator().manual_seed(seed)
    g, weights = torch.randn(examples, generator=draw), torch.rand(examples, generator=draw) + 0.1
    weights = weights / weights.sum()
    g = g - (g * weights).sum() * (1 - 1e-6)
    zm.update(projected_grad=g, weights=weights)
    moved = torch.sqrt(sum((p.tensor - w).square().sum() for p, w in zip(zm.parameters, start, strict=True)))
    longest = torch.sqrt(sum(z.flatten(1).square().sum(1) for z in zs)).max()
    assert 0 < moved <= examples**0.5 * longest * 1.0001


@pytest.mark.parametrize(
    "options", [{"rule": "meazo"}, {"rule": "zo_adam", "blocks": "layer"}, {"estimator": "grzo"}], ids=str
)
def test_replayed_and_resumed_are_bitwise(options, tmp_path) -> None:
    """Through the journal's file: batches of other sizes, an example without labels, a step that was skipped."""
    whole = tiny(**options)
    log = journal.Journal.start(tmp_path / "journal", {"journal": journal.VERSION})
    for step in range(5):
        if step == 3:
            weights, state = snapshot(whole.model), whole.state_dict()
        inputs = batch("llama", 1 + step, 7, seed=step)
        if step == 1:
            inputs["labels"][0] = -100
        if step == 2:
            inputs["labels"][:] = -100
        log.append(whole.step(**inputs).record())
    log.close()
    replayed, resumed = tiny(**options), tiny(**options)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for record in journal.Journal.read_from(tmp_path / "journal").records():
        replayed.replay(record)
        if record["step"] >= 3:
            resumed.replay(record)
    assert unchanged(replayed.model, snapshot(whole.model)) and unchanged(resumed.model, snapshot(whole.model))
    end = whole.state_dict()
    for zm in (replayed, resumed):
        assert all(torch.equal(v, end[k]) for k, v in zm.state_dict().items() if isinstance(v, Tensor))


def test_grzo_divides_by_the_spread_over_the_batch() -> None:
    """2606.02857 without its factor 1/2ε: δ_i / std_j(δ_j), torch's own standard deviation, the mean not taken off."""
    plain, relative = small(), small(estimator="grzo")
    g = plain.step(**words(5)).projected_grad
    result = relative.step(**words(5))
    assert torch.allclose(result.projected_grad, g / g.std(), rtol=1e-4)
    assert float(result.projected_grad.std()) == pytest.approx(1, rel=1e-5)


def test_grzo_takes_an_example_without_labels_for_a_zero() -> None:
    inputs = batch("llama", 4, 8)
    inputs["labels"][1] = -100
    g, relative = (tiny(estimator=name).step(**inputs).projected_grad for name in ("population", "grzo"))
    assert torch.allclose(relative, g / g.std(), rtol=1e-4) and relative[1] == 0


def test_grzo_keeps_steps_whose_examples_agree() -> None:
    """As those of an error rate do: its differences have few values."""
    project, eps = get_estimator("grzo").project, torch.tensor(0.5)
    for losses, expected in (
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [3**0.5, 3**0.5, 0.0]),
        ([[1.0, 1.0], [0.0, 0.0]], [1.0, 1.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0]),
    ):
        assert torch.allclose(project(torch.tensor(losses), eps), torch.tensor(expected))


def test_of_one_example_grzo_keeps_the_sign() -> None:
    result = small(estimator="grzo").step(**words(1))
    assert abs(float(result.projected_grad)) == pytest.approx(1, rel=1e-6) and not result.skipped


def test_grzo_is_of_the_whole_batch_of_a_step() -> None:
    inputs = batch("llama", 5, 8)
    whole, split = tiny(estimator="grzo"), tiny(estimator="grzo")
    one = whole.step(**inputs)
    for rows in (slice(0, 2), slice(2, 5)):
        split.accumulate(**{name: value[rows] for name, value in inputs.items()})
    assert torch.equal(one.projected_grad, split.update().projected_grad)


def test_what_does_not_fit_a_population_is_named() -> None:
    zm = small()
    record = json.loads(json.dumps(to_jsonable(small().step(**words()).record())))
    del record["weights"]
    with pytest.raises(ZOError, match="weights"):
        zm.replay(record)
    with pytest.raises(ZOError, match=r"a population's losses are \[2, batch\]"):
        zm.update(losses=torch.zeros(2))
    with pytest.raises(ZOError, match="3 examples, got 2 projected gradients"):
        zm.update(losses=torch.zeros(2, 3), projected_grad=torch.zeros(2))
    with pytest.raises(ZOError, match=r"3 examples, got weights of shape \(2,\)"):
        zm.update(projected_grad=torch.zeros(3), weights=torch.ones(2))
    with pytest.raises(ZOError, match="not of 'central'"):
        small(estimator="central").update(projected_grad=torch.tensor(1.0), weights=torch.ones(1))


def test_one_side_at_a_time_gives_the_same_losses() -> None:
    both, one = small(), small(memory="sequential")
    assert torch.equal(both.step(**words()).losses, one.step(**words()).losses)


def test_the_compiled_population_equals_the_loop_at_every_batch_size() -> None:
    eager, compiled = small("eager"), small("compiled")
    for zm in (eager, compiled):
        zm.step(**words())
    before = inductor.compile_count
    for rows, length in ((1, 5), (7, 3), (2, 9)):
        for zm in (eager, compiled):
            zm.accumulate(**words(rows, length))
        assert torch.allclose(eager.peek()[0], compiled.peek()[0], rtol=1e-5)
        g = torch.linspace(-1, 1, rows)
        for zm in (eager, compiled):
            zm.update(projected_grad=g)
            zm.eps = 2e-2
    assert inductor.compile_count == before and compiled.inspect().engine == "compiled"
    for a, b in zip(eager.parameters, compiled.parameters, strict=True):
        assert torch.allclose(a.tensor, b.tensor, rtol=1e-5, atol=1e-6), a.name


def shifted_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``shift`` may have any number of rows."""
    return nn.functional.cross_entropy(model(inputs["x"]) + inputs["shift"].sum(0), inputs["y"], reduction="none")


def shifted(rows: int, shifts: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    x, shift = torch.randn(rows, 5, generator=draw), torch.randn(shifts, 3, generator=draw)
    return {"x": x, "y": torch.randint(0, 3, (rows,), generator=draw), "shift": shift, "unread": torch.arange(rows)}


def linear(engine: str | None):
    torch.manual_seed(0)
    return zowrap.zo_wrap(nn.Linear(5, 3), "zo_sgd", loss_fn=shifted_loss, estimator="population", engine=engine)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_the_examples_own_and_one_row_is_shared(shared) -> None:
    """Also where the loss would run with any number of them."""
    eager, compiled = linear("eager"), linear("compiled")
    for rows in (4, 2, 7, 1):
        inputs = shifted(rows, 1 if shared else rows)
        for zm in (eager, compiled):
            zm.discard()
            zm.accumulate(**inputs)
            assert zm.peek()[0].shape == (2, rows)
        assert torch.allclose(eager.peek()[0], compiled.peek()[0], rtol=1e-5)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(("rows", "shifts"), [(4, 2), (2, 4), (1, 2)])
def test_another_number_of_rows_is_refused(engine, rows, shifts) -> None:
    """In a batch of as many examples it would be taken apart."""
    message = f"'shift' has {shifts} for {rows} example{'s' if rows > 1 else ''} \\("
    zm = linear(engine)
    with pytest.raises(ZOError, match=message):
        zm.step(**shifted(rows, shifts))
    with pytest.raises(ZOError, match=message):  # also once there is a program
        zm.step(**shifted(3, 1))
        zm.step(**shifted(rows, shifts))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_population(name) -> None:
    """Compiled, or eagerly with a warning that says why."""
    eager, other = (
        zowrap.zo_wrap(make(name), "zo_sgd", lr=1e-3, estimator="population", engine=engine)
        for engine in ("eager", None)
    )
    for rows, length in ((4, 9), (1, 7), (6, 12), (2, 2)):
        inputs = batch(name, rows, length, seed=rows)
        for zm in (eager, other):
            zm.discard()
            zm.accumulate(**inputs)
        assert torch.allclose(eager.peek()[0], other.peek()[0], rtol=1e-5, atol=1e-6)


def test_a_population_needs_the_loss_of_each_example() -> None:
    zm = zowrap.zo_wrap(
        Words(), "zo_sgd", loss_fn=lambda m, b: words_loss(m, b).mean(), estimator="population", engine="eager"
    )
    with pytest.raises(ZOError, match=r"\[batch\]"):
        zm.step(**words())
