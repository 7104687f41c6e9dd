"""Measure the parts of a step separately, and alternative designs for them.

Laws of the noise are timed in the kernel that perturbs a weight; products with the tall matrices of OPT-125M and its
head against the same products with the weights as they are, as the length of the chunks varies.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zowrap
import zowrap.ops.all
from zowrap.bench import measure
from zowrap.compiler.inductor import compile_function
from zowrap.loss.module import sum_token_losses
from zowrap.numerics import noise
from zowrap.ops import scratch

ELEMENTS = 1 << 20
TOKENS, WIDTH, INNER, VOCABULARY, LAYERS = 512, 768, 3072, 50272, 6
LONG = 2048  # tokens of the longer rows
# Rows of a chunk. They divide INNER, so that no chunk is longer or shorter than it says.
CHUNKS = (256, 512, 1024, 3072)
HEAD_CHUNKS = (512, 1024, 2048, 4096)  # about: a head is cut evenly


def checked_table(bits: Tensor, table: Tensor) -> Tensor:
    """The gaussian law with the look-up as torch writes it: 64-bit indices, each checked."""
    magnitude = table[noise._shift_right(bits, 20)]
    return magnitude * ((bits << 31 >> 31) | 1).to(torch.float32)


def sum_of_bytes(bits: Tensor, table: Tensor) -> Tensor:
    """Four uniform bytes added: far from a normal law (kurtosis 2.7), for comparison."""
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + ((bits >> 24) & 255)
    return (total - 510).to(torch.float32) * (1 / 147.8)


def polynomial(bits: Tensor, table: Tensor) -> Tensor:
    """An odd polynomial of degree 13 of a uniform number, to time it; it is still 2e-3 from normal."""
    x = bits.to(torch.float32) * 2.0**-31
    y, value = x * x, torch.full_like(x, 1.1)
    for coefficient in (0.2, 0.3, 0.4, 0.5, 0.6, 1.25):
        value = value * y + coefficient
    return x * value


def two_lookups(bits: Tensor, table: Tensor) -> Tensor:
    """Two signed 12-bit look-ups added: smoother tails than one, for twice the look-ups."""
    first = torch.ops.aten._unsafe_index(table, [noise._shift_right(bits, 20)])
    second = torch.ops.aten._unsafe_index(table, [noise._shift_right(bits << 12, 20)])
    signed = first * ((bits << 31 >> 31) | 1).to(torch.float32) + second * ((bits << 30 >> 31) | 1).to(torch.float32)
    return signed * 2**-0.5


def nothing(bits: Tensor, table: Tensor) -> Tensor:
    """The hash without a law."""
    return bits.to(torch.float32)


LAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hash alone": nothing,
    "rademacher": noise.rademacher,
    "gaussian: table of 4096": noise.gaussian,
    "gaussian: the same, checked look-up": checked_table,
    "two look-ups, added": two_lookups,
    "polynomial of degree 13": polynomial,
    "sum of four bytes": sum_of_bytes,
}


def run(rounds: int) -> dict[str, Any]:
    """Measure all tables."""
    tables = {"laws": laws, "deferred": deferred, "chunks": chunks, "stacked": stacked}
    return {
        "machine": measure.describe_machine(),
        "rounds": rounds,
        **{name: table(rounds) for name, table in tables.items()},
    }


def laws(rounds: int) -> list[dict[str, Any]]:
    """Measure how many elements per second each law perturbs, for ``w ± εz`` at two points."""
    calls: dict[str, Callable[[], Any]] = {}
    w, above, below = torch.randn(ELEMENTS), torch.empty(ELEMENTS), torch.empty(ELEMENTS)
    small = [torch.tensor([3, 4], dtype=torch.int32), torch.tensor([1e-3, -1e-3]), noise.gaussian_table()]
    for name, law in LAWS.items():
        kernel = _perturbation(law)
        compiled = compile_function(kernel, [w, above, below, *small], range(3))
        calls[name] = functools.partial(compiled, w, above, below, *small)
    seconds = interleaved(calls, rounds, repeats=8)
    return [{"law": name, "per_second": ELEMENTS / statistics.median(s)} for name, s in seconds.items()]


def _perturbation(law: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple]:
    """``w ± εz`` under a law, in one loop."""

    def kernel(w: Tensor, above: Tensor, below: Tensor, key: Tensor, coefficients: Tensor, table: Tensor) -> tuple:
        index = torch.arange(w.shape[0], dtype=torch.int32)
        z = law(noise.hash_bits(index, 0, key), table)
        above.copy_(w + coefficients[0] * z)
        below.copy_(w + coefficients[1] * z)
        return ()

    return kernel


def deferred(rounds: int) -> list[dict[str, Any]]:
    """Time a step's loops over a million elements, with the update on its own or inside the next perturbation."""
    w, above, below = torch.randn(ELEMENTS), torch.empty(ELEMENTS), torch.empty(ELEMENTS)
    keys = [torch.tensor(key, dtype=torch.int32) for key in ((3, 4), (5, 6))]
    small = [*keys, torch.tensor([1e-3, -1e-3, 1e-9]), noise.gaussian_table()]

    def direction(w: Tensor, key: Tensor, table: Tensor) -> Tensor:
        return noise.gaussian(noise.hash_bits(torch.arange(w.shape[0], dtype=torch.int32), 0, key), table)

    def write(w: Tensor, above: Tensor, below: Tensor, old: Tensor, new: Tensor, c: Tensor, table: Tensor) -> tuple:
        w.copy_(w - c[2] * direction(w, old, table))
        return ()

    def perturb(w: Tensor, above: Tensor, below: Tensor, old: Tensor, new: Tensor, c: Tensor, table: Tensor) -> tuple:
        z = direction(w, new, table)
        above.copy_(w + c[0] * z)
        below.copy_(w + c[1] * z)
        return ()

    def both(w: Tensor, above: Tensor, below: Tensor, old: Tensor, new: Tensor, c: Tensor, table: Tensor) -> tuple:
        z, moved = direction(w, new, table), w - c[2] * direction(w, old, table)
        above.copy_(moved + c[0] * z)
        below.copy_(moved + c[1] * z)
        w.copy_(moved)
        return ()

    def compiled(kernel: Callable[..., tuple]) -> Callable[[], Any]:
        return functools.partial(compile_function(kernel, [w, above, below, *small], range(3)), w, above, below, *small)

    calls = {"perturbation": compiled(perturb), "update": compiled(write), "both in one loop": compiled(both)}
    seconds = interleaved(calls, rounds, repeats=8)
    return [{"loops": name, "seconds": statistics.median(s) / ELEMENTS * 1e6} for name, s in seconds.items()]


def chunks(rounds: int) -> list[dict[str, Any]]:
    """Time the products with tall matrices, and the head with its loss, for two points and a number of tokens."""
    return [{"tokens": tokens, **row} for tokens in (TOKENS, LONG) for row in _chunks(rounds, tokens)]


@torch.no_grad()
def _chunks(rounds: int, tokens: int) -> list[dict[str, Any]]:
    zm = zowrap.zo_wrap(torch.nn.Linear(2, 2), "zo_sgd", lr=1e-7, loss_fn=lambda m, b: m(b["x"]).sum(-1))
    zm.step(x=torch.ones(2, 2))
    key_of_kernels: str = zm.engine.kernels.key  # type: ignore[attr-defined]
    key, coefficients = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1e-3, -1e-3])
    given: tuple[Any, ...] = ([], key, torch.ones(()), [], coefficients)
    weights = [torch.randn(INNER, WIDTH) for _ in range(LAYERS)]
    inputs = [torch.randn(tokens, WIDTH) for _ in range(2)]
    vocabulary, labels = torch.randn(VOCABULARY, WIDTH), torch.randint(0, VOCABULARY, (8, tokens // 8))
    hidden = [torch.randn(8, tokens // 8, WIDTH) for _ in range(2)]
    plain_head = torch.compile(
        lambda x: sum_token_losses(torch.nn.functional.linear(x, vocabulary), labels), dynamic=False
    )
    perturb_linear, perturb_head = torch.ops.zowrap.perturb_linear, torch.ops.zowrap.perturb_head

    def at(length: int, call: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            scratch.CHUNK_ROWS, scratch.LEAST_ELEMENTS = length, 1
            call()

        return timed

    def products() -> None:
        for w in weights:
            perturb_linear(inputs, w, *given, False, key_of_kernels)

    calls: dict[tuple[str, int], Callable[[], Any]] = {
        ("layers", 0): lambda: [torch.nn.functional.linear(x, w) for w in weights for x in inputs],
        ("head", 0): lambda: [plain_head(x) for x in hidden],
    }
    for length in CHUNKS:
        calls["layers", length] = at(length, products)
    for length in HEAD_CHUNKS:
        calls["head", length] = at(length, lambda: perturb_head(hidden, vocabulary, [], *given, labels, key_of_kernels))
    kept = scratch.CHUNK_ROWS, scratch.LEAST_ELEMENTS
    try:
        seconds = interleaved(calls, rounds)
    finally:
        scratch.CHUNK_ROWS, scratch.LEAST_ELEMENTS = kept
    plain = {part: statistics.median(seconds[part, 0]) for part in ("layers", "head")}
    return [
        {"part": part, "rows": length, "seconds": statistics.median(s), "ratio": statistics.median(s) / plain[part]}
        for (part, length), s in seconds.items()
    ]


@torch.no_grad()
def stacked(rounds: int) -> list[dict[str, Any]]:
    """Time a plain product for both points, one after the other or with stacked rows."""
    rows, linear = [], torch.nn.functional.linear
    for shape in ((WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)):
        w, x = torch.randn(shape), torch.randn(2 * TOKENS, shape[1])
        above, below = x[:TOKENS].clone(), x[TOKENS:].clone()
        calls: dict[str, Callable[[], Any]] = {
            "apart": functools.partial(_both, above, below, w),
            "stacked": functools.partial(linear, x, w),
        }
        seconds = {name: statistics.median(s) for name, s in interleaved(calls, rounds, repeats=8).items()}
        rows.append({"shape": list(shape), **seconds})
    return rows


def _both(above: Tensor, below: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.linear(above, w), torch.nn.functional.linear(below, w)


def interleaved(calls: dict[Any, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[Any, list[float]]:
    """Time one call of each function per round, after one round that does not count."""
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if i:
                found[name].append((time.perf_counter() - start) / repeats)
    return found
