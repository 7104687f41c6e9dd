"""The compiled engine with Triton loops runs eagerly if a kernel cannot be generated, compiled or launched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zowrap
from zowrap import ZOModel
from zowrap.errors import ZOCaptureError, ZOWarning
from zowrap.ops import kernels
from zowrap.ops import loops as plain_loops
from zowrap.ops.triton import loops, sources
from zowrap.rules.base import Rule, mean_gradient


@pytest.fixture(autouse=True)
def triton_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_loops, "compile_loop", loops.compile_loop)
    monkeypatch.setattr(kernels, "_registry", {})


def wrap(device: torch.device, engine: str | None, squash: Callable[[Tensor], Tensor] = torch.sign) -> ZOModel:
    """Wrap a layer with a rule that applies ``squash`` to ĝ."""

    def leaf(w: Tensor, g: Tensor, slots: Any, c: Any, hyper: Any) -> tuple:
        return w - hyper["lr"] * squash(g), slots

    rule = Rule("squashed", 1e-2, {}, lambda state, probe, hyper: (state, {"g": mean_gradient(probe)}), leaf)
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).to(device)
    return zowrap.zo_wrap(layer, rule, engine=engine, seed=0, loss_fn=lambda m, b: m(b["x"]).square().mean(-1))


def check_falls_back(device: torch.device, match: str, **options: Any) -> None:
    """Check that the first step warns and runs eagerly, or fails without moving weights if the engine is fixed."""
    x = torch.ones(4, 5, device=device)
    eager = wrap(device, "eager", **options)
    eager.step(x=x)
    ours = wrap(device, None, **options)
    with pytest.warns(ZOWarning, match=f"running eagerly, because .*{match}"):
        ours.step(x=x)
    assert ours.inspect().engine == "eager" and torch.equal(ours.model.weight, eager.model.weight)
    strict = wrap(device, "compiled", **options)
    before = strict.model.weight.clone()
    with pytest.raises(ZOCaptureError, match=f"engine='compiled' was asked for, but .*{match}"):
        strict.step(x=x)
    assert torch.equal(strict.model.weight, before)


def test_what_can_be_written_stays_compiled(device: torch.device) -> None:
    zm = wrap(device, "compiled")
    before = zm.model.weight.clone()
    zm.step(x=torch.ones(4, 5, device=device))
    assert zm.inspect().engine == "compiled" and not torch.equal(zm.model.weight, before)


def test_an_operation_that_cannot_be_written_runs_eagerly(device: torch.device) -> None:
    check_falls_back(device, r"aten\.tanh\.default", squash=torch.tanh)


def test_without_triton_no_kernel_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ZOCaptureError, match="need Triton"):
        loops.compile_loop(lambda x: (x * 2,), [torch.empty(64, device=device)], [0])


class Refusing:
    """Replaces a kernel and raises an error after ``count`` launches."""

    def __init__(self, kernel: Any, count: int) -> None:
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launched(*given: Any, **options: Any) -> None:
            if self.count == 0:
                raise RuntimeError("\nPassManager::run failed\n")
            self.count -= 1
            self.kernel[grid](*given, **options)

        return launched


@pytest.mark.parametrize("count", (0, 1), ids=("warming up", "evaluating"))
def test_a_kernel_that_triton_refuses_runs_eagerly(
    count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sources.kernel
    monkeypatch.setattr(sources, "kernel", lambda source: Refusing(made(source), count))
    check_falls_back(device, r"RuntimeError: PassManager::run failed")
