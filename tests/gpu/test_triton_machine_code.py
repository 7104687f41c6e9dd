"""Every kernel through Triton's compiler and NVIDIA's assembler: what a GPU would run, without one."""

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

# In a process of its own: Triton decides at its import whether kernels are interpreted or compiled.
SCRIPT = """
import json, torch
from benchmarks.gpu import machine_code
from tests.gpu import test_triton_loops as loops, test_triton_product as products
from zowrap import kernels
from zowrap.gpu import cross_entropy, product
from zowrap.quant import code_operators

cpu, lines = torch.device("cpu"), []

def note(name):
    for line in found[len(lines):]:
        lines.append({"name": name, "fused": "fma.rn.f32" in line["ptx"], "ptx": line.pop("ptx"), **line})

with machine_code.compiling() as found:
    bf16 = [case for case in loops.CASES if case[2] == torch.bfloat16 and (case[0] == "zo_sgd" or case[1] is None)]
    for rule, direction, dtype in [*bf16, ("zo_adam", None, torch.float32)]:
        machine_code.elementwise(rule, direction, dtype, found)
        note(f"loop {rule} {direction} {dtype}")
    for rule, dtype, tokens in [
        ("zo_sgd", torch.bfloat16, 128), ("conmezo", torch.float16, 1), ("hizoo", torch.float32, 32)
    ]:
        spec, kernel = products.spec_of(rule, None, cpu)
        kernels._registry[spec] = kernel
        one, slots = torch.ones(()), [torch.ones(9600, 64) for _ in kernel.read_names]
        x, w = torch.ones(tokens, 64, dtype=dtype), torch.ones(9600, 64, dtype=dtype)
        given = [x, x], w, slots, torch.ones(2, dtype=torch.int32), one, [one] * len(kernel.scalar_names), torch.ones(2)
        product.perturbed_products(*given, False, spec)
        note(f"product {rule} {dtype} {tokens}")
    state = [torch.zeros(4) for _ in range(3)]
    cross_entropy.add(torch.zeros(4, 1500, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), *state,
        torch.zeros(2, dtype=torch.int32))
    note("cross-entropy")
for line in lines:
    ptx = line.pop("ptx")
    line["flushes"], line["approximate"] = ".ftz" in ptx, "approx" in ptx
print(json.dumps(lines))
"""


@functools.cache
def compiled() -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels_named(pattern: str) -> list[dict[str, Any]]:
    found = [line for line in compiled() if re.match(pattern, line["name"])]
    assert found
    return found


def test_loops_round_after_every_operation() -> None:
    """No product and sum made one, no approximate division or root, and small numbers are not taken for 0."""
    for line in kernels_named("loop"):
        assert not (line["fused"] or line["flushes"] or line["approximate"]), line


def test_nothing_spills() -> None:
    """A register that does not fit is a trip to memory for every element."""
    assert [line["name"] for line in compiled() if line["stack"]] == []


def test_products_fit_into_the_shared_memory_of_small_gpus() -> None:
    """99 KiB of a consumer's card, the least among those that have bfloat16 (compute capability 8.6 and 8.9)."""
    assert max(line["shared"] for line in kernels_named("product")) <= 99 << 10
