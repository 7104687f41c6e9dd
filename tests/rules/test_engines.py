"""Rules under both engines beyond what tests/rules/test_properties.py holds: probes that see state, 16-bit weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zowrap
from tests.engines.test_compiled import Odd, odd_batch, odd_loss
from tests.support.rule_cases import KINDS, flat, name_of
from zowrap import rules
from zowrap.testing import draw_losses, wrap


@pytest.mark.parametrize(
    "rule",
    [rules.conmezo(theta=1.2), pytest.param(rules.hizoo(a=1e-4), marks=pytest.mark.slow)],
    ids=["conmezo", "hizoo"],
)
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
        seen = eager.peek()[0], compiled.peek()[0]
        assert torch.allclose(*seen, rtol=1e-5, atol=0)
        losses = seen[0].float()
        # Steps long enough for the state to shape the next direction visibly.
        for zm in (eager, compiled):
            zm.update(losses=losses)
    assert compiled.inspect().engine == "compiled" and compiled.inspect().compile_count == (2 if rule.points else 1)


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
        for a, b in zip(exact.job.slots[slot], rounded.job.slots[slot], strict=True):
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
