"""Compare the Triton kernel of the running logsumexp with torch's cross-entropy."""

from __future__ import annotations

import itertools

import pytest
import torch

from zowrap.loss.module import IGNORED
from zowrap.ops.head import _LOWEST, _Running
from zowrap.ops.loops import offset

pytest.importorskip("triton", reason="the kernels for a GPU are written in Triton")

from zowrap.ops.triton import cross_entropy

pytestmark = pytest.mark.usefixtures("loops_run")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("cuts", ((0, 1), (0, 700, 1500), (0, 1023, 1024, 1500)))
def test_chunks_add_up_to_the_cross_entropy(cuts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (10 * torch.randn(5, cuts[-1], device=device)).to(dtype)
    labels = torch.tensor([0, cuts[-1] - 1, cuts[-1] // 2, IGNORED, cuts[-1] // 3], device=device)
    running = _Running(labels)
    for first, last in itertools.pairwise(cuts):
        chunk = logits[:, first:last].contiguous()
        state = (running.labels, running.highest, running.total, running.picked)
        cross_entropy.add(chunk, *state, offset(first, device))
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(running.losses(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_a_logit_that_is_not_finite_shows(value: float, device: torch.device) -> None:
    logits = torch.zeros(2, 2000, device=device)
    logits[1, 1500] = value
    running = _Running(torch.tensor([3, 4], device=device))
    state = (running.labels, running.highest, running.total, running.picked)
    cross_entropy.add(logits, *state, offset(0, device))
    finite = torch.isfinite(running.losses())
    assert bool(finite[0]) and not bool(finite[1])


def test_classes_that_are_ruled_out_count_nothing(device: torch.device) -> None:
    logits = torch.zeros(1, 1100, device=device)
    logits[0, 100:] = -torch.inf
    running = _Running(torch.tensor([5], device=device))
    state = (running.labels, running.highest, running.total, running.picked)
    cross_entropy.add(logits, *state, offset(0, device))
    torch.testing.assert_close(running.losses(), torch.tensor([100.0], device=device).log())
    assert running.highest.item() == 0.0 and _LOWEST < 0.0
