"""Every rule under both engines: the same trajectory from the same losses, exact resumption, 16-bit weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zowrap
from tests.rule_cases import KINDS, draw_losses, flat, name_of, wrap
from tests.test_engines import Odd, odd_batch, odd_loss
from zowrap import rules


def relative(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b - start))


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_compiled_and_eager_go_the_same_way(case) -> None:
    name, hyper, _ = case
    queries = {"hizoo": 2, "conmezo": 2, "fzoo": 3}.get(name, 1)
    eager, compiled = (wrap(rules.get(name, **hyper), queries=queries, engine=e) for e in ("eager", "compiled"))
    start = flat(eager)
    for losses in draw_losses(eager, 10):
        eager.update(losses=losses)
        compiled.update(losses=losses)
    assert compiled.inspect().engine == "compiled"
    assert relative(flat(compiled), flat(eager), start) <= 1e-5
    for slot, tensors in eager._job.slots.items():
        for a, b in zip(tensors, compiled._job.slots[slot], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max())), slot
    for state, other in zip(eager._job.states, compiled._job.states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("rule", [rules.conmezo(theta=1.2), rules.hizoo(a=1e-4)], ids=["conmezo", "hizoo"])
def test_compiled_probes_see_the_state(rule) -> None:
    """Directions that depend on state: embedding rows, products, vectors and convolutions of both engines agree."""
    torch.manual_seed(0)
    model = Odd()
    eager = zowrap.zo_wrap(model, rule, lr=1e-2, loss_fn=odd_loss, engine="eager")
    torch.manual_seed(0)
    compiled = zowrap.zo_wrap(Odd(), rule, lr=1e-2, loss_fn=odd_loss, engine="compiled")
    for _ in range(4):
        for zm in (eager, compiled):
            zm.accumulate(**odd_batch())
        seen = eager._measured.losses(), compiled._measured.losses()
        assert torch.allclose(*seen, rtol=1e-5, atol=0)
        losses = seen[0].float()
        # Steps long enough for the state to shape the next direction visibly.
        for zm in (eager, compiled):
            zm.update(losses=losses)
    assert compiled.inspect().engine == "compiled" and compiled.inspect().compile_count == (2 if rule.points else 1)


@pytest.mark.parametrize("blocks", [None, "layer"])
@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_resumed_is_uninterrupted_bitwise(case, blocks) -> None:
    name, hyper, _ = case
    whole, half = (wrap(rules.get(name, **hyper), blocks=blocks) for _ in range(2))
    losses = draw_losses(whole, 12)
    for given in losses[:5]:
        half.update(losses=given)
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in half.state_dict().items()}
    weights = {k: v.clone() for k, v in half.model.state_dict().items()}
    resumed = wrap(rules.get(name, **hyper), blocks=blocks)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for given in losses:
        whole.update(losses=given)
    for given in losses[5:]:
        resumed.update(losses=given)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[k], v) if isinstance(v, torch.Tensor) else ours[k] == v for k, v in theirs.items()
    )
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_a_step_that_is_not_finite_changes_nothing(case) -> None:
    name, hyper, _ = case
    zm = wrap(rules.get(name, **hyper))
    good = draw_losses(zm, 2)
    zm.update(losses=good[0])
    before = flat(zm), {k: v.clone() for k, v in zm.state_dict().items() if isinstance(v, torch.Tensor)}
    bad = good[1].clone()
    bad[-1] = float("nan")
    assert zm.update(losses=bad).skipped
    assert np.array_equal(flat(zm), before[0])
    assert all(torch.equal(zm.state_dict()[k], v) for k, v in before[1].items())


def check_sixteen_bit(case, engine: str) -> None:
    name, hyper, _ = case
    rule = rules.get(name, **hyper)
    exact, rounded = wrap(rule), wrap(rule, dtype=torch.bfloat16, engine=engine)
    start = flat(exact)
    for losses in draw_losses(exact, 6):
        exact.update(losses=losses)
        rounded.update(losses=losses)
    assert all(p.tensor.dtype == torch.bfloat16 for p in rounded.parameters)
    state = {k: v for k, v in rounded.state_dict().items() if isinstance(v, torch.Tensor)}
    assert all(v.dtype == torch.float32 for v in state.values())
    for slot in rule.slot_names("element"):
        for a, b in zip(exact._job.slots[slot], rounded._job.slots[slot], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max())), slot
    if rule.refresh is not None:
        return  # a weight at the threshold leaves the mask in one precision and stays in the other
    # Six roundings and the first, each below 2⁻⁷ of the weight.
    largest = np.maximum(np.abs(start), np.abs(flat(exact))).max()
    assert np.abs(flat(rounded) - flat(exact)).max() <= 7 * 2**-7 * largest


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_sixteen_bit_weights_keep_their_dtype_and_the_state_its_precision(case) -> None:
    check_sixteen_bit(case, "eager")


@pytest.mark.parametrize("case", [c for c in KINDS if c[0] == "hizoo" and c[1]], ids=name_of)
def test_sixteen_bit_weights_compiled(case) -> None:
    check_sixteen_bit(case, "compiled")
