"""Compare the product that reads a weight once with separate products with a perturbed copy for each point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zowrap
from zowrap.numerics import noise
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.triton import product


def kernels_of(rule: str, direction: str | None, device: torch.device) -> kernels.Kernels:
    layer = torch.nn.Linear(5, 3).to(device)
    zm = zowrap.zo_wrap(layer, rule, lr=1e-2, direction=direction, loss_fn=lambda m, b: m(b["x"]).sum(-1))
    return zm.engine.kernels  # type: ignore[attr-defined]


def reference(
    x: list[Tensor], w: Tensor, args: NoiseArgs, coefficients: Tensor, kernel: kernels.Kernels, transposed: bool
) -> list[Tensor]:
    """Compute products in float64 with perturbed copies of the weight, rounded to its dtype."""
    low, high = noise.split_index(torch.arange(w.numel(), device=w.device).view(w.shape))
    table = noise.gaussian_table(w.device)
    copies = kernel.perturbation.points(w, low, high, args, coefficients, table)
    weights = [copy.double() if transposed else copy.double().t() for copy in copies]
    return [x[p % len(x)].double() @ weight for p, weight in enumerate(weights)]


@pytest.mark.usefixtures("loops_run")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tokens", (1, 17, 130))
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize(
    ("rule", "direction", "shared"),
    [("zo_sgd", None, False), ("zo_sgd", "rademacher", True), ("conmezo", None, False), ("hizoo", None, True)],
)
def test_products_equal_those_with_perturbed_copies(
    rule: str,
    direction: str | None,
    shared: bool,
    transposed: bool,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if (tokens == 130) and (dtype != torch.float32 or transposed):
        pytest.skip("one case of several blocks of tokens is enough")
    kernel = kernels_of(rule, direction, device)
    torch.manual_seed(0)
    inputs, outputs = 70, 37  # neither is a multiple of the tile size
    w = torch.randn((inputs, outputs) if transposed else (outputs, inputs), device=device).to(dtype)
    x = [torch.randn(tokens, inputs, device=device).to(dtype) for _ in range(1 if shared else 2)]
    slots = [torch.rand(w.shape, device=device) + 0.5 for _ in kernel.perturbation.slot_names]
    key = torch.tensor([11, -12], dtype=torch.int32, device=device)
    one = torch.tensor(0.7, device=device)
    args = NoiseArgs(slots, key, one, [one] * len(kernel.perturbation.scalar_names))
    coefficients = torch.tensor([0.3, -0.3], device=device)
    found = product.perturbed_products(x, w, args, coefficients, transposed, kernel.key)
    expected = reference(x, w, args, coefficients, kernel, transposed)
    exact = torch.finfo(dtype).eps
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == dtype and value.shape == (tokens, outputs)
        torch.testing.assert_close(value.double(), wanted, rtol=4 * exact, atol=16 * exact * inputs**0.5)
    assert not torch.equal(found[0], found[1])


def test_tiles_are_fixed_by_the_shape_alone() -> None:
    assert [product._tile_rows(n) for n in (16384, 8192, 4096, 2048, 100)] == [64, 64, 32, 16, 16]


@pytest.mark.parametrize(("setting", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_tf32_is_taken_where_the_program_allows_it(setting: str, value: Any) -> None:
    float32 = torch.zeros(8, 8)
    assert product._precision(float32) == "ieee"
    try:
        setattr(torch.backends.cuda.matmul, setting, value)
        assert product._precision(float32) == "tf32" and product._precision(float32.bfloat16()) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert product._precision(float32) == "ieee"


def test_a_cpu_takes_the_scratch() -> None:
    assert not product.applies([torch.zeros(4, 8)], torch.zeros(8, 8))
