"""16-bit weights: rounding is unbiased, exact on representable values, and loses no update."""

from __future__ import annotations

import pytest
import torch

from zowrap.numerics import noise
from zowrap.numerics.rounding import round_stochastically, round_to_nearest

IDS = torch.arange(1)


def bits(count: int, step: int = 0) -> torch.Tensor:
    key = noise.derive_keys(0, step, 0, IDS, noise.TAG_ROUNDING)[0]
    return noise.hash_bits(*noise.split_index(torch.arange(count)), key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.3, -0.3, 1.7e-3, 123.4, 3e-6, -5e-8, 2.0**-14 * 0.999, 0.99999])
def test_mean_is_the_value(dtype: torch.dtype, value: float) -> None:
    count = 400_000
    exact = torch.full((count,), value)
    rounded = round_stochastically(exact, bits(count), dtype).double()
    values = rounded.unique()
    assert len(values) <= 2  # only the two neighbours
    error = (values.max() - values.min()).item() / 2 / count**0.5 + abs(value) * 2**-23
    assert abs(rounded.mean().item() - exact[0].item()) <= 4 * error + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_representable_values_stay(dtype: torch.dtype) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-7, 6e-8], dtype=torch.float32).to(dtype)])
    assert torch.equal(round_stochastically(values.float(), bits(len(values)), dtype), values)


def test_float16_saturates_instead_of_overflowing() -> None:
    assert round_stochastically(torch.tensor([1e6, -1e6]), bits(2), torch.float16).tolist() == [65504.0, -65504.0]


def test_not_finite_stays_not_finite() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(
        round_stochastically(values, bits(3), torch.bfloat16).isfinite(), torch.zeros(3, dtype=torch.bool)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nearest_is_the_conversion(dtype: torch.dtype) -> None:
    """Every exponent, ties (the low bits 100…0), both zeros, values beyond the largest, and what is not finite."""
    draw = torch.Generator().manual_seed(0)
    raw = torch.randint(-(2**31), 2**31, (400_000,), generator=draw, dtype=torch.int64).to(torch.int32)
    ties = raw & ~0x1FFF | 0x1000, raw & ~0xFFFF | 0x8000
    values = torch.cat([raw, *ties]).view(torch.float32)
    edge = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, -7e4, 3.4e38, 2.0**-25, 2.0**-14, float("inf")])
    values = torch.cat([values, edge])
    wanted = values.to(dtype).float()
    assert torch.equal(round_to_nearest(values, dtype).nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(round_to_nearest(values, dtype).isnan(), wanted.isnan())


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float8"):
        round_stochastically(torch.ones(2), bits(2), torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8"):
        round_to_nearest(torch.ones(2), torch.float8_e4m3fn)
