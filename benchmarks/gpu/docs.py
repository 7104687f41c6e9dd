"""``docs/gpu.md`` from the committed JSON, one section for each GPU."""

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

`make bench-gpu` measures all of it on the machine it runs on: whole steps against two plain forwards compiled with
`mode="reduce-overhead"`, in one process, each between two of the yardstick's; the classic in-place MeZO step; and AdamW
with gradient checkpointing on all weights and on LoRA adapters. Beside each stands what bounds it from below: bytes
moved against those of two forwards, and the integer operations of its noise. Tables are generated from
`benchmarks/results/gpu` by `python -m benchmarks.gpu docs`.

What is different on a GPU:

- *Kernels are Triton*, written from the same functions as the C++ loops and the eager engine, and rounding after every
  operation as these do: noise, perturbed weights and elementwise updates have the bits of a CPU, given the same
  coefficients. The coefficients themselves, sums over state and the thin products of low-rank updates are torch's own
  and may differ in the last bit. The tests run the arithmetic of every kernel in Triton's interpreter on a CPU, and
  compile each kind for a Hopper GPU. In the elementwise ones no product is fused with a sum, nothing is approximated or
  taken for 0, and no register spills. Products add up as matrix products do, in tiles that fill the registers: with two
  points a thread spills at most 8 bytes, with three (`hizoo`, conservative steps) at most 256.
- *A rule of your own* becomes such kernels where it is written with sums, products, quotients, roots, whole powers,
  signs, comparisons, clamps and rounding; with anything else (`exp`, say) the run warns and goes on eagerly.
- *Products of up to 128 tokens* (32 in float32) read a weight once for both sides of a direction and make its
  perturbed forms in registers. With more tokens each block of them would make the noise again: there row chunks pass
  through a scratch. The choice follows shape and dtype alone, so a resumed run adds up in the same order.
- *A step is one CUDA graph* from the second batch of a kind on (names, shapes, dtypes): batch, step number, η, ε and
  state lie on the device, and a step that is not finite is skipped there. Eight kinds are kept for each block; others
  run as they are. So that few kinds come, `zowrap tune` pads a batch there to the next of eight even lengths; with a
  collator of your own, pad to a multiple. Three kinds of step run without a CUDA graph: several micro-batches;
  `sparse_mezo`, which renews its thresholds on some steps only; 8-bit models with `llm_int8_threshold` above 0 (the
  default of bitsandbytes is 6), which wait for the device to say which columns to multiply apart.
- *Quantised layers* run their own library's kernels. Where scales or codes move, both sides share one integer product
  of bitsandbytes' 8-bit layers, so their codes are read once; the part of codes that a direction adds is a float32
  product through a scratch, which no kernel of ours replaces yet.
"""

NOTHING = """## No figures yet

Nothing on this page has been measured on a GPU: the speed of the kernels is not known. The recording of steps is tested
with a trace in place of a CUDA graph.
"""


CODE = """## What the compiler makes of the kernels

Compiled for a Hopper GPU (compute capability 9.0) by Triton {triton} and its assembler, on a machine without one
(`python -m benchmarks.gpu.machine_code`): instructions for each element of a bfloat16 weight, of which integer and
float, registers of a thread, and bytes of the stack that it spills to. "Perturb" makes both points of a direction.
"""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    code = [_code(load(MACHINE_CODE))] if MACHINE_CODE.exists() else []
    return "\n".join([HEAD, *code, *(map(_section, results) if results else [NOTHING])])


def write() -> None:
    """The page from the kept results."""
    paths = sorted(RESULTS.glob("*.json"))
    PAGE.write_text(page([load(path) for path in paths]), encoding="utf-8")


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
