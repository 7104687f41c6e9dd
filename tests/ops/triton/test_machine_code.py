"""Compile every kernel with Triton's compiler and NVIDIA's assembler, and check the machine code without a GPU."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels for a GPU are written in Triton")
pytestmark = pytest.mark.slow

# Run in a separate process, because Triton decides at import whether kernels are interpreted or compiled.
SCRIPT = """
import json, pytest, re, torch
from benchmarks.gpu import machine_code
from tests.ops.triton import test_loops as loops, test_product as products
from zowrap import rules
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.loops import alike
from zowrap.ops.triton import cross_entropy, product
from zowrap.ops import codes as code_operators

cpu, lines, cold = torch.device("cpu"), [], []
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32

def note(name):
    for line in found[len(lines):]:
        lines.append({"name": name, **line})

def elementwise(rule, direction, dtype, **options):
    try:
        zm = loops.kernels_of(rule, direction, dtype, cpu, **options)
    except pytest.skip.Exception:
        return
    loops.exercise(zm, dtype, [""] * 6, cpu, 1024, 16)
    note(f"loop {zm.rule.describe()} {direction} {dtype} {options}")

def write_codes(kernel, rows, first):
    matrix, key = torch.zeros(rows, 64), torch.zeros(2, dtype=torch.int32)
    code_operators._write(kernel, matrix.to(torch.int8), matrix, matrix, torch.ones(99), first, key, key[0] > 0)

def multiply(rule, dtype, tokens, points):
    kernel = products.kernels_of(rule, None, cpu)
    kernels._registry[kernel.key] = kernel
    one, slots = torch.ones(()), [torch.ones(9600, 64) for _ in kernel.perturbation.slot_names]
    x, w = torch.ones(tokens, 64, dtype=dtype), torch.ones(9600, 64, dtype=dtype)
    scalars = [one] * len(kernel.perturbation.scalar_names)
    noise = NoiseArgs(slots, torch.ones(2, dtype=torch.int32), one, scalars)
    product.perturbed_products([x] * points, w, noise, torch.ones(points), False, kernel.key)
    note(f"product of {points} {rule} {dtype} {tokens}")

with machine_code.compiling() as found:
    for rule, direction, dtype in loops.CASES:
        if rule == "zo_sgd" or (direction is None and dtype != f32):
            elementwise(rule, direction, dtype)
    elementwise("zo_adam", None, f32)
    elementwise(rules.zo_sgd(sign="elementwise"), None, bf16)
    for dtype in (bf16, f16):
        for masters, along in [(False, "evaluated"), (True, "drawn"), (True, "evaluated")]:
            elementwise("zo_adam", None, dtype, masters=masters, along=along)
    write_codes(loops.kernels_of("zo_sgd", None, f32, cpu).engine.kernels, 64, 0)
    note("loop codes")
    for rule, dtype, tokens, points in [
        ("zo_sgd", bf16, 128, 2), ("conmezo", f16, 128, 2), ("conmezo", f16, 1, 2), ("conmezo", f32, 32, 2),
        ("hizoo", f32, 32, 2), ("hizoo", bf16, 128, 3), ("conmezo", f32, 32, 3),
    ]:
        multiply(rule, dtype, tokens, points)
    state = [torch.zeros(4) for _ in range(3)]
    cross_entropy.add(torch.zeros(4, 1500, dtype=bf16), torch.zeros(4, dtype=torch.int64), *state,
        torch.zeros(2, dtype=torch.int32))
    note("cross-entropy")

def step(rule, dtype, direction):
    \"\"\"Return the kernels that a step compiles only when it runs, for lengths that Triton distinguishes.\"\"\"
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 3))
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    loss = lambda m, b: (m(b["x"]) * m.scale).sum(-1)
    zm = loops.zowrap.zo_wrap(model.to(dtype), rule, lr=1e-2, direction=direction, loss_fn=loss)
    job, engine, kernel = zm.job, zm.engine, zm.engine.kernels
    engine._warm(0, 2)
    warmed = {line["variant"] for line in found}
    query = zm.directions.queries[0]
    for i, p in enumerate(zm.parameters if direction != "lowrank(1)" else []):
        seen = [job.slots[name][i].view(-1) for name in kernel.perturbation.slot_names]
        scalars = [query.scalars[name] for name in kernel.perturbation.scalar_names]
        w = p.tensor.detach().view(-1)
        noise = NoiseArgs(seen, query.keys[i], query.scale, scalars)
        kernel.perturbation.write(w, noise, torch.ones(2), [torch.empty_like(w) for _ in range(2)])
    zm.update(projected_grad=torch.ones(()))
    return [f"{rule} {direction} {line['variant']}" for line in found if line["variant"] not in warmed]

for rule, dtype, direction in [("conmezo", bf16, None), ("zo_sgd", f32, "sphere"), ("zo_sgd", f32, "lowrank(1)")]:
    with machine_code.compiling() as found:
        cold += step(rule, dtype, direction)
with machine_code.compiling() as found:
    kernel = loops.kernels_of("zo_sgd", None, f32, cpu).engine.kernels
    code_operators.warm(kernel, cpu, alike(64))
    warmed = {line["variant"] for line in found}
    for first in (16, 35):
        write_codes(kernel, 64, first)
    cold += [line["variant"] for line in found if line["variant"] not in warmed]

for line in lines:
    ptx = line.pop("ptx")
    # The floor instruction treats subnormal numbers as 0; the emitted code corrects it (zowrap/ops/triton/emit.py).
    line["flushes"] = ".ftz" in ptx.replace("cvt.rmi.ftz", "")
    line["fused"], line["approximate"] = re.search(r"\\bfma\\.", ptx) is not None, "approx" in ptx
print(json.dumps({"lines": lines, "cold": cold}))
"""


@functools.cache
def compiled() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels_named(pattern: str) -> list[dict[str, Any]]:
    found = [line for line in compiled()["lines"] if re.match(pattern, line["name"])]
    assert found
    return found


def test_loops_round_after_every_operation() -> None:
    """Loops have no fused multiply-add and no approximate division or root, and keep subnormal numbers."""
    for line in kernels_named("loop"):
        assert not (line["fused"] or line["flushes"] or line["approximate"]), line


def test_loops_and_the_cross_entropy_do_not_spill() -> None:
    """A spilled register costs an access to memory for every element."""
    assert [line["name"] for line in kernels_named("loop|cross-entropy") if line["stack"]] == []


@pytest.mark.parametrize(("points", "most"), [(2, 8), (3, 256)])
def test_products_spill_no_more_than_is_said(points: int, most: int) -> None:
    """docs/gpu.md states these bytes per thread; the tiles are sized to fill the registers."""
    assert max(line["stack"] for line in kernels_named(f"product of {points}")) <= most


def test_products_fit_into_the_shared_memory_of_small_gpus() -> None:
    """Consumer cards with compute capability 8.6 and 8.9 have 99 KiB, the least of all GPUs with bfloat16."""
    assert max(line["shared"] for line in kernels_named("product")) <= 99 << 10


def test_a_step_launches_what_was_compiled_before_it() -> None:
    """Triton recompiles for each alignment and for arguments equal to 1; this must not happen during an update."""
    assert compiled()["cold"] == []
