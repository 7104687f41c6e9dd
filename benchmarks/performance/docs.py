"""Write ``docs/performance.md`` from the committed JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zowrap.bench import contenders

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

The yardstick is two plain compiled forwards of the same model and batch, which a central difference needs at least,
unless it shares work between them. A ratio compares a whole step, including the update, with the yardstick just before
and after it in the same process; the tables give the median and quartiles over rounds. "First start" is the time from
the model to the end of the first step in a new process with an empty cache, and "second start" is the same with the
cache filled. "Peak" is a step's extra memory above what is held between steps. Start times and peaks are measured by
`python -m benchmarks.performance starts`, single peaks by `zowrap bench step --only ROW --json`, and are blank if not
measured. `python -m benchmarks.performance docs` generates this page from `benchmarks/results/performance`.
"""

STEP = """## A step: OPT-125M, float32, 8 × 64 tokens

`python -m benchmarks.performance step` (`zowrap bench step --arch opt-125m --batch 8 --seq 64 --together --json`)

`sparse_mezo` computes a quantile of every matrix at each step, which costs as much as the two forwards; with
`refresh=100` it does so at every hundredth step.
"""

LONG = """## Longer rows: 8 × 256 tokens

`python -m benchmarks.performance long`

Noise and update cost the same for every batch, so their share falls with longer rows.
"""

GROWTH = """## Growth

`python -m benchmarks.performance growth`

The model is an OPT with 8 layers, 4096 words and width 256, on 8 × 64 tokens, with gaussian directions and `zo_sgd`;
each row varies one size. The ratio is to two forwards for each query. A cost that grows faster than the forwards would
show as a ratio that rises down the column.
"""

PROFILE = """## Profile

`python -m benchmarks.performance profile`

The table shows seconds by kind of work, for two plain forwards and a gaussian step in turn, under torch's profiler. The
plain forwards' cross-entropy is in the last row.
"""

OPERATORS = """## Designs that were tried

`python -m benchmarks.performance operators`
"""

DESIGNS = """\
- **The gaussian law.** A table of 4096 half-normal quantiles stays in the first-level cache and is 6e-5 from normal
  (Kolmogorov–Smirnov). The first table below times it in the kernel that computes w ± εz. An odd polynomial would need
  no look-up, but a polynomial of a uniform number is still 2e-3 from normal at degree 13, and one of a sum of four
  fields 2e-4 at degree 5, where it also has a lattice of its own; neither passes the test at 10⁷ draws with a margin.
- **Chunks.** Short chunks keep the scratch buffer in the cache but make the products less efficient; long ones do the
  reverse. Their rows are a multiple of 16, which is a cache line of outputs. Cut evenly instead, into 1026 rows, the
  head took 1.2 times as long as the plain one at 2048 tokens, and a step of 8 × 256 tokens 1.06 to 1.15 times as long
  as two forwards in three runs.
- **The head.** Writing the logits of both points costs page faults and a second pass for the cross-entropy. A running
  logsumexp costs neither, and skips tokens whose label is ignored. On a GPU it includes all tokens, because finding out
  which ones count would wait for the device.
- **One product for both points.** If both points have the same weight (a frozen base, the layers above the active
  block), stacking their rows saves one read of the weight: 5 or 6 % of a product in the last table, and nothing or less
  on other days. This would be at most 3 % of a step with low-rank directions, so the points stay separate.
- **The deferred update** (step t's update inside step t + 1's read of the weights) saves one pass over the weights, but
  not the noise, which both steps need. In a loop of its own it saves a fifth of the time (second table), which is about
  3 % of a step of 8 × 64 tokens and 1 % at 8 × 256. It is not implemented, because a tied weight is read twice in a
  step, and everything that reads the weights between steps would have to wait for the update.
"""


# The ratios that the design aims at, for short and long rows.
AIMS = {
    "gaussian": 1.20,
    "rademacher": 1.12,
    "lowrank(1)": 1.08,
    "population, lowrank(1)": 1.15,
    "one layer per step": 0.85,
    "LoRA r8": 1.05,
}
LONG_AIMS = {"gaussian": 1.08}


def read_result(name: str) -> dict[str, Any] | None:
    """Read the kept result of a measurement; None if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def page() -> str:
    """The whole page as Markdown, without the sections whose measurements are missing."""
    parts = [HEAD]
    for name, heading, body in (
        ("step", STEP, _steps),
        ("long", LONG, _long),
        ("profile", PROFILE, _profile),
        ("growth", GROWTH, _growth),
        ("operators", OPERATORS, _operators),
    ):
        if (result := read_result(name)) is not None:
            missing = ""
            if name == "step":
                starts = read_result("starts")
                missing = _list_missing_rows(result)
                alone = {row["row"]: row for row in starts["rows"]} if starts is not None else {}
                result = {**result, "rows": [{**row, **alone.get(row["row"], {})} for row in result["rows"]]}
            parts += [heading, _machine(result), body(result), *([missing] if missing else [])]
    return "\n".join(parts)


def write_page() -> None:
    """Write the page from the kept results."""
    PAGE.write_text(page(), encoding="utf-8")


def _machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}; {result['rounds']} rounds.\n"


def _list_missing_rows(step: dict[str, Any]) -> str:
    """Name the rows of ``zowrap bench step`` that the table lacks; empty if there are none."""
    found = {row["row"] for row in step["rows"]}
    missing = [f"`{name}`" for name in contenders.NAMES if name not in found]
    if not missing:
        return ""
    names = ", ".join(missing)
    text = f"This table, timed in {step['rounds']} rounds, lacks these rows of `zowrap bench step`: {names}."
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f}–{values['high']:.{digits}f})"


def _long(result: dict[str, Any]) -> str:
    return _steps(result, LONG_AIMS)


def _steps(result: dict[str, Any], aims: dict[str, float] = AIMS) -> str:
    def cell(value: float | None, unit: str, scale: float = 1.0, digits: int = 1) -> str:
        return "" if value is None else f"{value * scale:.{digits}f} {unit}"

    rows = [
        [
            r["row"],
            cell(r["seconds"]["median"], "ms", 1e3, 0),
            _spread(r["ratio"]),
            _aim(r["ratio"]["median"], aims.get(r["row"])),
            cell(r.get("first_start"), "s"),
            cell(r.get("second_start"), "s"),
            cell(r.get("peak_bytes"), "MB", 2**-20, 0),
        ]
        for r in result["rows"]
    ]
    return _table(["", "a step", "ratio (quartiles)", "aim", "first start", "second start", "peak"], rows)


def _aim(ratio: float, aim: float | None) -> str:
    if aim is None:
        return ""
    return f"{aim:.2f}" if ratio <= aim else f"{aim:.2f}, missed by {100 * (ratio / aim - 1):.1f} %"


def _growth(result: dict[str, Any]) -> str:
    rows = [
        [
            r["axis"],
            f"{r['parameters'] / 1e6:.1f} M",
            str(r["tokens"]),
            str(r["queries"]),
            str(r["blocks"]),
            f"{r['seconds']['median'] * 1e3:.0f} ms",
            _spread(r["ratio"]),
        ]
        for r in result["rows"]
    ]
    return _table(["varied", "parameters", "tokens", "queries", "blocks", "a step", "ratio (quartiles)"], rows)


def _profile(result: dict[str, Any]) -> str:
    """The table of seconds by kind of work, for two forwards and a step, with the difference by kind."""
    rows = result["profile"]
    head, lines = [""], {kind: [kind] for kind in rows[0]["seconds"]}
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        total = sum(plain["seconds"].values())
        head += [f"{plain['tokens']} tokens: two forwards", "a step", "difference, of the forwards"]
        for kind, line in lines.items():
            before, after = plain["seconds"][kind], ours["seconds"][kind]
            line += [f"{before * 1e3:.0f} ms", f"{after * 1e3:.0f} ms", f"{100 * (after - before) / total:+.1f} %"]
    return _table(head, list(lines.values()))


def _operators(result: dict[str, Any]) -> str:
    laws = [[r["law"], f"{r['per_second'] / 1e6:.0f}"] for r in result["laws"]]
    chunks = [
        [str(r["tokens"]), r["part"], str(r["rows"] or "plain"), f"{r['seconds'] * 1e3:.0f} ms", f"{r['ratio']:.2f}"]
        for r in result["chunks"]
    ]
    stacked = [
        [f"{r['shape'][0]} × {r['shape'][1]}", f"{r['apart'] * 1e3:.1f} ms", f"{r['stacked'] * 1e3:.1f} ms"]
        for r in result["stacked"]
    ]
    loops = [[r["loops"], f"{r['seconds'] * 1e3:.2f} ms"] for r in result["deferred"]]
    return "\n".join(
        [
            DESIGNS,
            _table(["law", "million elements per second"], laws),
            _table(["a step's loops over a million weights", "time"], loops),
            "Perturbed products with six matrices of 3072 × 768, and the perturbed head with its loss, for both "
            "points, compared with the plain ones:\n",
            _table(["tokens", "part", "rows per chunk", "time", "ratio"], chunks),
            "Plain products of 512 tokens for both points:\n",
            _table(["weight", "separate", "stacked"], stacked),
        ]
    )
