"""Compile the Triton kernels to machine code for a GPU that need not be present, and count its instructions.

    python -m benchmarks.gpu.machine_code          benchmarks/results/machine_code.json

Triton carries NVIDIA's assembler, so a kernel's instructions, registers and spills are known without
running it. How fast it runs cannot.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURE = 90  # compute capability: Hopper (H100, H200)
# Of the disassembly: the opcodes of integers, of floats, and of what reaches outside of the registers.
_INTEGER = ("IMAD", "LOP", "SHF", "IADD", "LEA", "ISETP", "IABS", "PRMT", "IMNMX", "VIADD", "SEL")
_FLOAT = ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "MUFU", "I2F", "F2I", "F2F", "HADD", "HMUL", "HFMA")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDC", "ATOM", "RED", "LDL", "STL")


class Stand:
    """Replaces a kernel: when launched, it compiles the kernel and runs nothing.

    Args:
        function: of ``triton.jit``.
        found: where a line for each launch goes.
    """

    def __init__(self, function: Any, found: list[dict[str, Any]]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launched

    def _launched(self, *given: Any, **named: Any) -> None:
        names = list(self.function.arg_names)
        values = {**dict(zip(names, given, strict=False)), **{n: v for n, v in named.items() if n in names}}
        options = {n: v for n, v in named.items() if n not in names}
        self.found.append(_line(self.function, values, options, self.found))


def _line(function: Any, values: dict[str, Any], options: dict[str, Any], found: list[dict[str, Any]]) -> Any:
    """Compile one launch, or repeat its line of ``found`` if Triton would reuse a compiled kernel."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    constants, signature, aligned = {}, {}, {}
    for i, parameter in enumerate(function.params):
        name, value, special = parameter.name, values[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = mangle_type(value)
        if special and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            aligned[(i,)] = [["tt.divisibility", 16]]
    variant = repr((function.__module__, signature, constants, aligned, options))
    for line in found:
        if line["variant"] == variant:
            return dict(line)
    source = ASTSource(function, signature, constants, aligned)
    return {"architecture": ARCHITECTURE, "variant": variant, **_compiled(source, values.get("BLOCK"), options)}


def _compiled(source: Any, block: int | None, options: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    per_thread = block // (32 * options.get("num_warps", 4)) if block else None
    return {"ptx": kernel.asm["ptx"], "shared": kernel.metadata.shared, **_facts(kernel.asm["cubin"], per_thread)}


def _facts(cubin: bytes, per_thread: int | None) -> dict[str, Any]:
    """Registers, bytes of spilled ones, and instructions: in all, and for an element where there is no loop."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def dump(option: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, option, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, listing = dump("--dump-resource-usage"), dump("-sass")
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing, re.MULTILINE)
    body = opcodes[: max((i for i, name in enumerate(opcodes) if name == "EXIT"), default=-1) + 1]
    counts = Counter(_class(name) for name in body)
    facts: dict[str, Any] = {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "instructions": len(body),
        **counts,
    }
    if per_thread:
        facts["per_element"] = {name: count / per_thread for name, count in [("all", len(body)), *counts.items()]}
    return facts


def _class(opcode: str) -> str:
    for name, opcodes in (("integer", _INTEGER), ("float", _FLOAT), ("memory", _MEMORY)):
        if opcode.startswith(opcodes):
            return name
    return "other"


@contextmanager
def compiling() -> Iterator[list[dict[str, Any]]]:
    """Compile kernels while inside instead of launching them; their results stay uninitialised.

    Yields:
        what was compiled so far: a line for each launch.
    """
    from zowrap.ops import kernels, loops
    from zowrap.ops.triton import cross_entropy, product, sources
    from zowrap.ops.triton.loops import compile_loop

    found: list[dict[str, Any]] = []
    made, add, kept, compile_here = sources.kernel, cross_entropy._add, kernels._registry, loops.compile_loop
    sources.kernel = lambda source: Stand(made(source), found)  # type: ignore[assignment]
    cross_entropy._add = Stand(add, found)
    loops.compile_loop, kernels._registry = compile_loop, {}
    product._kernel.cache_clear()
    try:
        yield found
    finally:
        sources.kernel, cross_entropy._add = made, add
        loops.compile_loop, kernels._registry = compile_here, kept
        product._kernel.cache_clear()


def elementwise(rule: str, direction: str | None, dtype: torch.dtype, found: list[dict[str, Any]]) -> None:
    """Compile the perturbation at two points and the update of a rule; call it inside :func:`compiling`."""
    import zowrap
    from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs

    layer = torch.nn.Linear(64, 64, dtype=dtype)
    zm = zowrap.zo_wrap(layer, rule, lr=1e-2, direction=direction, loss_fn=lambda m, b: m(b["x"]).sum(-1))
    kernel = zm.engine.kernels  # type: ignore[attr-defined]
    w, key, one = torch.ones(4096, dtype=dtype), torch.ones(2, dtype=torch.int32), torch.ones(())
    scalars = [one for _ in kernel.perturbation.scalar_names]
    noise = NoiseArgs([torch.ones(4096) for _ in kernel.perturbation.slot_names], key, one, scalars)
    kernel.perturbation.write(w, noise, torch.ones(2), [torch.ones_like(w) for _ in range(2)])
    found[-1]["kernel"] = "perturb"
    slots = [torch.ones(4096) for _ in kernel.rule.slot_names("element")]
    coefficients = [torch.ones(shape) for shape in kernel.update.coefficient_shapes.values()]
    args = UpdateArgs(slots, key, coefficients, [one] * 3, torch.tensor(True), False)
    kernel.update.write(w, args, DrawnDirections([key], [one], scalars))
    found[-1]["kernel"] = "update"


ROWS: tuple[tuple[str, str | None], ...] = (
    *((rule, None) for rule in ("zo_sgd", "meazo", "zo_adam", "conmezo", "hizoo")),
    ("zo_sgd", "rademacher"),
)


def run() -> list[dict[str, Any]]:
    """The table of docs/gpu.md: elementwise kernels on bfloat16 weights, for Hopper."""
    rows = []
    for rule, direction in ROWS:
        with compiling() as found:
            elementwise(rule, direction, torch.bfloat16, found)
        for line in found:
            kept = {name: line[name] for name in ("kernel", "architecture", "registers", "stack", "per_element")}
            rows.append({"rule": rule, "direction": direction or "gaussian", **kept})
    return rows


def main() -> None:
    import triton

    from benchmarks.gpu import docs
    from benchmarks.papers.docs import write_json

    write_json({"triton": triton.__version__, "rows": run()}, docs.MACHINE_CODE)


if __name__ == "__main__":
    main()
