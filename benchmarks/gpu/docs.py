"""Write ``docs/gpu.md`` from the committed JSON, with one section for each GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.performance.docs import _spread, _table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
MACHINE_CODE = ROOT / "benchmarks" / "results" / "machine_code.json"
PAGE = ROOT / "docs" / "gpu.md"

HEAD = """# On a GPU

`make bench-gpu` measures the following on your machine: whole steps against two plain forwards that are compiled with
`mode="reduce-overhead"`, in one process, each step between two of these yardsticks; the classic in-place MeZO step; and
AdamW with gradient checkpointing on all weights and on LoRA adapters. The tables also show lower bounds of a step's
cost: the bytes it moves compared with two forwards, and the integer operations of its noise. `python -m benchmarks.gpu
docs` generates them from `benchmarks/results/gpu`.

These things are different on a GPU:

- **Triton kernels.** Kernels are generated from the same functions as the C++ loops and the eager engine, and round
  after every operation as these do: given the same coefficients, noise, perturbed weights and elementwise updates have
  the same bits as on a CPU. The coefficients themselves, sums over state and the thin products of low-rank updates are
  torch's own and may differ in the last bit. The tests run the arithmetic of every kernel in Triton's interpreter on a
  CPU, and compile each kind for a Hopper GPU. The elementwise kernels fuse no product with a sum, approximate nothing,
  flush nothing to 0, and spill no register. Products accumulate in tiles that fill the registers, as matrix products
  do: with two points a thread spills at most 8 bytes, with three (`hizoo`, conservative steps) at most 256.
- **Your own rule** becomes such kernels if it uses only sums, products, quotients, roots, integer powers, signs,
  comparisons, clamps and rounding. If it uses anything else (`exp`, for example), the run warns and continues on the
  eager engine.
- **Products of up to 128 tokens** (32 in float32) read a weight once for both sides of a direction and perturb it in
  registers. With more tokens, each block of tokens would generate the noise again, so row chunks of perturbed weights
  pass through a scratch buffer instead. The choice depends only on shape and dtype, so a resumed run adds in the same
  order.
- **CUDA graphs.** A step becomes one CUDA graph from the second batch of the same kind (names, shapes, dtypes) on. The
  batch, the step number, η, ε and the state are on the device, and a step that is not finite is skipped there. Eight
  kinds are kept for each block; other batches run without a graph. To have few kinds, `zowrap tune` pads a batch on a
  GPU to the next of eight even lengths; in your own collator, pad to a multiple. These steps run without a CUDA graph:
    - steps of several micro-batches;
    - `sparse_mezo`, which renews its thresholds only on some steps;
    - 8-bit models with `llm_int8_threshold` above 0 (the default of bitsandbytes is 6), which wait for the device to
      say which columns to multiply separately.
- **Quantised layers** run the kernels of their own library. If scales or codes move, both sides share one integer
  product of bitsandbytes' 8-bit layers, so their codes are read once. With codes, the part that a direction adds is a
  float32 product through a scratch buffer, for which we have no kernel yet.
"""

NOTHING = """## No figures yet

Nothing on this page has been measured on a GPU: the speed of the kernels is not known. The recording of steps is tested
with a trace instead of a CUDA graph.
"""


CODE = """## Machine code of the kernels

The kernels were compiled for a Hopper GPU (compute capability 9.0) by Triton {triton} and its assembler, on a machine
without a GPU (`python -m benchmarks.gpu.machine_code`). The table shows the instructions per element of a bfloat16
weight, how many of them are integer and float, the registers of a thread, and the bytes that it spills to the stack.
"Perturb" computes both points of a direction.
"""


def read_result(path: Path) -> dict[str, Any]:
    """Read the JSON of one measurement."""
    return json.loads(path.read_text(encoding="utf-8"))


def page(results: list[dict[str, Any]]) -> str:
    """The whole page as Markdown."""
    code = [_code(read_result(MACHINE_CODE))] if MACHINE_CODE.exists() else []
    return "\n".join([HEAD, *code, *(map(_section, results) if results else [NOTHING])])


def write_page() -> None:
    """Write the page from the kept results."""
    paths = sorted(RESULTS.glob("*.json"))
    PAGE.write_text(page([read_result(path) for path in paths]), encoding="utf-8")


def _code(result: dict[str, Any]) -> str:
    rows = [
        [
            row["kernel"],
            row["rule"],
            row["direction"],
            *(f"{row['per_element'].get(name, 0):.0f}" for name in ("all", "integer", "float")),
            str(row["registers"]),
            str(row["stack"]),
        ]
        for row in result["rows"]
    ]
    head = ["kernel", "rule", "direction", "instructions", "integer", "float", "registers", "stack"]
    return CODE.format(triton=result["triton"]) + "\n" + _table(head, rows)


def _section(result: dict[str, Any]) -> str:
    machine, cases = result["machine"], dict.fromkeys(row["case"] for row in result["rows"])
    parts = [f"## {machine['gpu']}\n", f"torch {machine['torch']}, {result['rounds']} rounds.\n"]
    for case in cases:
        rows = [_cells(row) for row in result["rows"] if row["case"] == case]
        head = ["", "a step", "ratio (quartiles)", "peak", "of inference", "bytes", "integer operations"]
        parts += [f"### {case}\n", _table(head, rows)]
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["row"], row["error"], "", "", "", "", ""]
    costs, peak = row.get("costs"), row["peak"]
    return [
        row["row"],
        f"{row['seconds']['median'] * 1e3:.1f} ms",
        _spread(row["ratio"]) if "ratio" in row else "",
        "" if peak is None else f"{peak / 1e9:.2f} GB",
        "" if peak is None else f"{peak / (row['resting'] + row['inference']):.2f}",
        "" if costs is None else f"{costs['bytes'] / costs['bytes_of_two_forwards']:.2f}",
        "" if costs is None else f"{costs['integer_operations'] / 1e9:.0f} G",
    ]
