"""Noise is a pure function of (seed, step, direction, parameter, element), and it has the law it claims."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zowrap import rules
from zowrap.numerics import noise
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.step import directions

IDS = torch.tensor([noise.parameter_id(f"layers.{i}.weight") for i in range(6)])


def key(seed: int = 0, step: int = 0, direction: int = 0, parameter: int = 0) -> torch.Tensor:
    return noise.derive_keys(seed, step, direction, IDS, noise.TAG_DIRECTION)[parameter]


def _python_bits(element: int, low: int, high: int) -> int:
    """The hash in unbounded Python integers: shares no code with the library."""
    mask = 0xFFFFFFFF
    x = ((element & mask) ^ low) * 0x7FEB352D & mask
    x ^= x >> 15
    x ^= (high + (element >> 32) * 0x9E3779B1) & mask
    x = x * 0x846CA68B & mask
    x ^= x >> 16
    x = x * 0x9E3779B1 & mask
    return x ^ (x >> 15)


@settings(max_examples=200, deadline=None)
@given(element=st.integers(0, 2**63 - 1), low=st.integers(0, 2**32 - 1), high=st.integers(0, 2**32 - 1))
def test_bits_equal_unbounded_integer_arithmetic(element: int, low: int, high: int) -> None:
    words = torch.tensor([low, high], dtype=torch.int64)
    as_key, _ = noise.split_index(words)
    bits = noise.hash_bits(*noise.split_index(torch.tensor([element])), as_key)
    assert int(bits) & 0xFFFFFFFF == _python_bits(element, low, high)


def test_gaussian_moments_and_kolmogorov_smirnov_at_ten_million_draws() -> None:
    z = noise.draw("gaussian", key(), (10_000_000,)).double().numpy()
    root = math.sqrt(len(z))
    assert abs(z.mean()) < 4 / root
    assert abs(z.var() - 1) < 4 * math.sqrt(2) / root
    assert abs((z**3).mean()) < 4 * math.sqrt(15) / root
    # The law stops at ±3.84σ, which costs its fourth moment 0.004.
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96) / root + 5e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
def test_gaussian_passes_for_any_seed(seed: int) -> None:
    z = noise.draw("gaussian", key(seed=seed, step=123), (200_000,)).numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_rademacher_is_plus_or_minus_one_and_fair() -> None:
    z = noise.draw("rademacher", key(), (4_000_000,))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean().item()) < 4 / 2000
    runs = (z[1:] != z[:-1]).float().mean().item()
    assert abs(runs - 0.5) < 4 * 0.5 / 2000


@pytest.mark.parametrize("law", sorted(noise.LAWS))
def test_streams_are_uncorrelated(law: str) -> None:
    """Parameters, steps, directions, seeds: all pairs, and elements at many lags."""
    keys = [key(parameter=i) for i in range(6)]
    keys += (
        [key(step=s) for s in (1, 2, 3, 1000)] + [key(direction=d) for d in (1, 2, 3)] + [key(seed=s) for s in (1, 2)]
    )
    count = 400_000
    z = torch.stack([noise.draw(law, k, (count,)) for k in keys]).double().numpy()
    correlation = np.corrcoef(z)[np.triu_indices(len(keys), 1)] * math.sqrt(count)
    assert np.abs(correlation).max() < 4.5  # 105 standard normal values
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 96, 128, 768, 1024, 4096, 65536):
        products = z[:, :-lag] * z[:, lag:]
        assert np.abs(products.mean(1) * math.sqrt(count - lag)).max() < 4.8, lag


def test_squares_are_uncorrelated_too() -> None:
    a = noise.draw("gaussian", key(), (1_000_000,)).square() - 1
    b = noise.draw("gaussian", key(step=1), (1_000_000,)).square() - 1
    assert abs((a * b).mean().item()) * 1000 / 2 < 4.5


def test_keys_do_not_collide() -> None:
    """(2, 7) and (3, 1), neighbouring seeds and negative ones: all different."""
    seen = set()
    for seed in (-1, 0, 1, 2, 3):
        for step in range(40):
            for direction in range(8):
                for low, high in noise.derive_keys(seed, step, direction, IDS, noise.TAG_DIRECTION).tolist():
                    seen.add((low, high))
    assert len(seen) == 5 * 40 * 8 * len(IDS)
    rounding = noise.derive_keys(0, 0, 0, IDS, noise.TAG_ROUNDING)
    assert not torch.equal(rounding, noise.derive_keys(0, 0, 0, IDS, noise.TAG_DIRECTION))


def test_keys_from_tensors_equal_keys_from_numbers() -> None:
    step = torch.tensor(12345)
    assert torch.equal(
        noise.derive_keys(7, step, 1, IDS, noise.TAG_DIRECTION),
        noise.derive_keys(7, 12345, 1, IDS, noise.TAG_DIRECTION),
    )


def test_parameter_id_is_fixed() -> None:
    """Ids are part of the journal's meaning: they must never change."""
    assert noise.parameter_id("model.layers.0.self_attn.q_proj.weight") == -2076487003303074038


def test_noise_ignores_and_leaves_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = noise.draw("gaussian", key(), (100,))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, noise.draw("gaussian", key(), (100,)))


@pytest.mark.parametrize("law", sorted(noise.LAWS))
def test_any_slice_equals_the_whole(law: str) -> None:
    whole = noise.draw(law, key(), (1000,))
    assert torch.equal(whole[137:411], noise.draw(law, key(), (274,), start=137))


@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
@pytest.mark.parametrize("start", [0, 5, 2**31 - 3, 2**32 - 7, 3 * 2**32 + 11])
def test_kernel_bits_equal_the_reference_at_any_offset(direction: str, start: int) -> None:
    """The fused path, across the boundaries of 31 and 32 bits."""
    kernel = kernels.register(kernels.Kernels(rules.zo_sgd(), directions.get(direction), {"g": (1,)}, []))
    w, out = torch.zeros(23), [torch.empty(23), torch.empty(23)]
    args = NoiseArgs([], key(), torch.ones(()), [])
    kernel.perturbation.write(w, args, torch.tensor([1.0, -1.0]), out, start)
    z = noise.draw(direction, key(), (23,), start=start)
    assert torch.equal(out[0], z)
    assert torch.equal(out[1], -z)


def test_integer_norm_is_exact_whatever_the_order() -> None:
    u = noise.draw("gaussian", key(), (50_000,))
    whole = directions.integer_squares(u).sum()
    assert whole == directions.integer_squares(u.flip(0)).reshape(100, 500).sum(0).sum()
    assert directions.squared_norm(whole).item() == pytest.approx(u.double().square().sum().item(), rel=1e-12)
