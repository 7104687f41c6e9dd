"""docs/quantized.md from the committed figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "quantized.md"

HEAD = """# Quantised models

Weights in 8 or 4 bit are tuned as they are: no copy of the model in floating point ever exists (the eager engine, which
is a reference, forms the perturbation of codes, and nothing else). A model comes from
`from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))`, or with `--load-in-8bit` on the
command line; its quantised layers are replaced, in place and without copying, by plain ones that give the same outputs
bit for bit, and put back for saving. Supported: bitsandbytes 8-bit (both thresholds) and 4-bit (nf4, fp4, double
quantisation), torchao int8 weight-only. Other schemes are refused by name.

| `quantized=` | what moves | what stays | for |
|---|---|---|---|
| `scales` (default of 8-bit) | one factor per row: scale · exp(s) | the codes | 8-bit |
| `adapters` (default of 4-bit, and with adapters) | LoRA beside the weights | codes and scales | 8- and 4-bit |
| `codes` (experimental) | the integer codes, by stochastic rounding | the scales | bitsandbytes 8-bit |

*Scales* follows QZO (arXiv 2505.13430) in relative form: the probe scale · exp(±εz) and the update
scale · exp(−η·clip(g, ±100)·z) keep every scale positive; both sides of a direction share one integer product, so the
codes are read once. `codes` on 4-bit weights is refused: one step of a code is up to a quarter of the largest weight of
its block. `scales` on 4-bit weights is refused: the block scales are themselves rounded when saved or computed with.

```sh
zowrap tune MODEL --load-in-8bit --data train.jsonl --eval-data dev.jsonl --out RUN            # scales
zowrap tune MODEL --load-in-4bit --use-peft --lora-r 8 --data train.jsonl --out RUN            # adapters on nf4
zowrap export RUN --to DIR --format bf16        # plain 16-bit weights, for serving engines and converters
zowrap export RUN --to DIR --format merged      # adapters merged: dequantise, add, requantise; the error is printed
```

A run of `scales` or `codes` reloads with plain `from_pretrained`, with the same logits bit for bit.
"""

NOISE = """## The floor under ε

An 8-bit layer rounds its inputs anew in every forward, so the loss is a step function at a fine scale: a difference of
two losses holds a part, *rounding*, that does not shrink with ε. `zowrap.quant.noise_floor(zm, batch)` measures it; the
*floor* is the ε at which the rounding counts as much as the slope. Agreement: directions on which the sign of the
projected gradient is the one at 10 ε. (`python -m benchmarks.quantized noise`)
"""

CODES = """## Why codes are experimental

Stochastic rounding is unbiased, but a write of Δ (in steps of a code, |Δ| ≪ 1) has variance |Δ|(1 − |Δ|) ≈ |Δ|. Over
T writes of η·g·z the sum is T·η·E|g z|, which depends on Ση alone: a smaller η with more steps makes the same noise. In
each weight it is √(Σ|Δ|) steps after a run, and Σ|Δ| exceeds the drift by the ratio of |g|·|z| to its useful part,
about √d. Fewer, better writes help:

- *q queries per write* average q directions: |Δ| falls by √q, writes by q at equal forwards; for equal drift η rises by
  q, so Σ|Δ| falls by √q.
- *one block per write* (`blocks="layer"`): a block of d/N elements has g smaller by √N; at η·N the noise summed over
  all elements falls by √N.
"""


FLOOR = """Only many directions per write come near exact arithmetic: below `queries=64` a warning says so. *Held*
directions are kept as (key, number) pairs, added to the weights when these are evaluated, and written together: error
feedback that needs no buffer, but draws each of them again in every forward; it gains no more than queries do.
"""


def table(lines: list[dict[str, Any]]) -> str:
    """One row for each form: the best rate's mean over seeds."""
    from benchmarks.quantized import FORMS, best_rate

    rows = [
        "| form | weights, MiB | what moves | η | zero-shot | test accuracy | gain | seeds | command |",
        "|" + "---|" * 9,
    ]
    for form in FORMS:
        mine = [line for line in lines if line["form"] == form]
        if not mine:
            continue
        rate = best_rate(lines, form)
        runs = [line for line in mine if line["lr"] == rate]
        accuracy = statistics.fmean(line["test_accuracy"] for line in runs)
        spread = f" ± {statistics.stdev(line['test_accuracy'] for line in runs):.3f}" if len(runs) > 1 else ""
        first = runs[0]
        rows.append(
            f"| {form} | {first['bytes'] / 2**20:.1f} | {first['elements']:,} | {rate:g} | {first['zero_shot']:.3f} | "
            f"{accuracy:.3f}{spread} | {100 * (accuracy - first['zero_shot']):+.1f} points | {len(runs)} | "
            f'`python -m benchmarks.quantized run --only "{form}"` |'
        )
    return "\n".join(rows)


def noise_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| form | ε | slope | rounding | floor | agreement |", "|" + "---|" * 6]
    for line in lines:
        values = [line["slope"], line["rounding"], line["floor"]]
        shown = " | ".join("below rounding" if v is None else f"{v:.2g}" for v in values)
        rows.append(f"| {line['form']} | {line['eps']:g} | {shown} | {line['agreement']:.0%} |")
    return "\n".join(rows)


def floor_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| written as | loss left, best η of three |", "|---|---|"]
    return "\n".join([*rows, *(f"| {line['remedy']} | {line['left']:.3f} |" for line in lines)])


UNMEASURED = """## Not measured yet

Accuracy and peak memory of the ways on a real task: `python -m benchmarks.quantized run --data-dir DATA` makes the
table, on MiniLM and TREC. Until it stands here, nothing is known of how much each way gains.
"""


def document(cells: list[dict[str, Any]], noise: list[dict[str, Any]], floor: list[dict[str, Any]]) -> str:
    """The page."""
    parts = [HEAD]
    if cells:
        parts.append(
            "## Accuracy and memory\n\nMiniLM (22M weights) on TREC, rule `meazo`, 2,400 forward passes of 16 "
            "examples, test accuracy on 500 rows that nothing was chosen on.\n\n" + table(cells) + "\n"
        )
    else:
        parts.append(UNMEASURED)
    if noise:
        parts.append(NOISE + "\n" + noise_table(noise) + "\n")
    parts.append(CODES)
    if floor:
        parts.append(
            f"On a quadratic of 96 × 96 weights, {floor[0]['forwards']:,} forwards each, exact projected gradients "
            "(`python -m benchmarks.quantized floor`):\n\n" + floor_table(floor) + "\n\n" + FLOOR
        )
    return "\n".join(parts)


def write_docs(cells: list[dict[str, Any]], noise: list[dict[str, Any]], floor: list[dict[str, Any]]) -> None:
    DOCS.write_text(document(cells, noise, floor), encoding="utf-8")
