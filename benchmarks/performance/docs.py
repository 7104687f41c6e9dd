"""``docs/performance.md`` from the committed JSON."""

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

The yardstick is two plain compiled forwards of the same model and batch: what a central difference cannot do without,
unless it shares work between them. A ratio is that of a whole step, update included, to the yardstick's step just
before and after it, in one process; the table gives the median over the rounds and the quartiles. "First start" is the
time from the model to the end of the first step in a fresh process with an empty cache, "second start" the same once
more; "peak" is the most memory that a step holds beyond what lies there between steps. Both stand where they were
measured, by `python -m benchmarks.performance starts`; a peak alone is that of one process, as
`zowrap bench step --only ROW --json` measures it. The page is generated from `benchmarks/results/performance` by
`python -m benchmarks.performance docs`.
"""

STEP = """## A step: OPT-125M, float32, 8 × 64 tokens

`python -m benchmarks.performance step` (`zowrap bench step --arch opt-125m --batch 8 --seq 64 --together --json`)

`sparse_mezo` takes a quantile of every matrix anew at each step, which costs as much as the two forwards;
`refresh=100` takes it at every hundredth.
"""

LONG = """## Longer rows: 8 × 256 tokens

`python -m benchmarks.performance long`: noise and update cost the same whatever the batch, so their share falls.
"""

GROWTH = """## As the work grows

`python -m benchmarks.performance growth`: an OPT of 8 layers, 4096 words, width 256, 8 × 64 tokens; one thing varied at
a time. Gaussian directions, `zo_sgd`. The ratio is to two forwards for each query; a term that grew faster than the
forwards would show as a ratio that rises down its column.
"""

PROFILE = """## Where the time goes

`python -m benchmarks.performance profile`: seconds by kind of work, two plain forwards and a Gaussian step in turn,
under torch's profiler. The plain forwards' cross-entropy is among all else.
"""

OPERATORS = """## What else was tried

`python -m benchmarks.performance operators`
"""

DESIGNS = """\
- *The gaussian law.* A table of 4096 half-normal quantiles stays in the first-level cache and is 6e-5 from normal
  (Kolmogorov–Smirnov). The table below times it in the kernel that makes w ± εz. An odd polynomial would save the
  look-up, but one of a uniform number is still 2e-3 from normal at degree 13, and one of a sum of four fields 2e-4 at
  degree 5 with a lattice of its own on top; neither passes the test at 10⁷ draws with room to spare.
- *Chunks.* Short chunks keep the scratch in the cache and make the products less efficient; long ones the reverse.
  Their rows are a multiple of 16, a cache line of outputs. Cut evenly instead, into 1026 rows, the head of 2048 tokens
  took 1.2 of the plain one's time, and a step of 8 × 256 tokens 1.06 to 1.15 of two forwards in three runs.
- *The head.* Writing both streams' logits costs page faults and a second pass for the cross-entropy; their running
  logsumexp costs neither, and tokens whose label is ignored are left out altogether. On a GPU all tokens take part:
  finding out which ones count would wait for the device.
- *One product for both streams.* Stacking the streams' rows where the weight is the same for both (a frozen base, the
  layers above the active block) saves a read of the weight: 5 or 6 % of a product in the last table, and nothing or
  less on other days. It would be at most 3 % of a step along low-rank directions, and the streams stay apart.
- *The deferred update* (step t's update inside step t + 1's read of the weights) saves one pass over the weights, but
  not the noise, which has to be made for both steps. As a loop by itself it saves a fifth of the time (second table),
  about 3 % of a step of 8 × 64 tokens and 1 % at 8 × 256. It is not built: a tied weight is read twice in a step, and
  whatever looks at the weights between steps would have to wait for a write.
"""


# The ratios that the design aims at; those of longer rows apart.
AIMS = {
    "gaussian": 1.20,
    "rademacher": 1.12,
    "lowrank(1)": 1.08,
    "population, lowrank(1)": 1.15,
    "one layer per step": 0.85,
    "LoRA r8": 1.05,
}
LONG_AIMS = {"gaussian": 1.08}


def load(name: str) -> dict[str, Any] | None:
    """A kept result, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def page() -> str:
    """The whole page; a measurement that is missing leaves its section out."""
    parts = [HEAD]
    for name, heading, body in (
        ("step", STEP, _steps),
        ("long", LONG, _long),
        ("profile", PROFILE, _profile),
        ("growth", GROWTH, _growth),
        ("operators", OPERATORS, _operators),
    ):
        if (result := load(name)) is not None:
            lacking = ""
            if name == "step":
                starts = load("starts")
                lacking = _lacking(result, starts)
                alone = {row["row"]: row for row in starts["rows"]} if starts is not None else {}
                result = {**result, "rows": [{**row, **alone.get(row["row"], {})} for row in result["rows"]]}
            parts += [heading, _machine(result), body(result), *([lacking] if lacking else [])]
    return "\n".join(parts)


def write() -> None:
    """The page from the kept results."""
    PAGE.write_text(page(), encoding="utf-8")


def _machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    return f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}; {result['rounds']} rounds.\n"


def _lacking(step: dict[str, Any], starts: dict[str, Any] | None) -> str:
    """Which rows of ``zowrap bench step`` the kept files have no figures of; empty where they have all."""
    alone = [] if starts is None else starts["rows"]
    clauses = [
        f"{sentence} {', '.join(f'`{name}`' for name in contenders.NAMES if name not in rows)}."
        for sentence, rows in (
            (f"This table, timed in {step['rounds']} rounds, lacks", {row["row"] for row in step["rows"]}),
            ("Start times were not measured for", {row["row"] for row in alone if "first_start" in row}),
            ("Peaks were not measured for", {row["row"] for row in alone}),
        )
        if not rows.issuperset(contenders.NAMES)
    ]
    if not clauses:
        return ""
    text = f"`zowrap bench step` has {len(contenders.NAMES)} rows. {' '.join(clauses)}"
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
    """Seconds by kind, two forwards beside a step, and how much of the difference each kind makes up."""
    rows = result["profile"]
    head, lines = [""], {kind: [kind] for kind in rows[0]["seconds"]}
    for plain, ours in zip(rows[::2], rows[1::2], strict=True):
        total = sum(plain["seconds"].values())
        head += [f"{plain['tokens']} tokens: two forwards", "a step", "more, of the forwards"]
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
            _table(["law", "million elements a second"], laws),
            _table(["a step's loops over a million weights", "time"], loops),
            "Products with six matrices of 3072 × 768, and the head with its loss, both points, perturbed, against the "
            "plain ones:\n",
            _table(["tokens", "part", "rows a chunk", "time", "ratio"], chunks),
            "Plain products of 512 tokens for both points:\n",
            _table(["weight", "apart", "stacked"], stacked),
        ]
    )
