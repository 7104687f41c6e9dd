"""docs/quantized.md from the committed figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "quantized.md"

HEAD = """# Quantised models

Weights in 8 or 4 bit are tuned as they are: no copy of the model in floating point ever exists. (The eager engine, a
reference, is the exception for `codes`: it holds the perturbation of all of them in float32 while it evaluates, and
updates one dequantised matrix after the other, with its directions.) A model comes from
`from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))`, or with `--load-in-8bit` on the
command line; its quantised layers are replaced, in place and without copying, by plain ones that give the same outputs
bit for bit, and put back for saving. Supported: bitsandbytes 8-bit (both thresholds) and 4-bit (nf4, fp4, double
quantisation), torchao int8 weight-only (as in torchao itself, one layer at a time is dequantised). Other schemes are
refused by name.

| `quantized=` | what moves | what stays | for |
|---|---|---|---|
| `scales` (default of 8-bit) | one factor per row: scale · exp(s) | the codes | 8-bit |
| `adapters` (default of 4-bit, and with adapters) | LoRA beside the weights | codes and scales | 8- and 4-bit |
| `codes` (experimental) | the integer codes, by stochastic rounding | the scales | bitsandbytes 8-bit |

*Scales* follows QZO (arXiv 2505.13430) in relative form: the probe scale · exp(±εz) and the update
scale · exp(−η·clip(g, ±100)·z) keep every scale positive. Both sides of a direction share one integer
product of a bitsandbytes 8-bit layer, so its codes are read once. `codes` on 4-bit weights is refused: one step of a
code is up to a quarter of the largest weight of its block. `scales` on 4-bit weights is refused: the block scales are
themselves rounded when saved or computed with.

```sh
zowrap tune MODEL --load-in-8bit --data train.jsonl --eval-data dev.jsonl --out RUN            # scales
zowrap tune MODEL --load-in-4bit --use-peft --lora-r 8 --data train.jsonl --out RUN            # adapters on nf4
zowrap inspect MODEL --load-in-8bit             # what would move, how and why, and the memory, from the headers alone
zowrap export RUN --to DIR --format bf16        # plain 16-bit weights, for serving engines; the error is printed
zowrap export RUN --to DIR --format merged      # adapters merged: dequantise, add, requantise; the error is printed
```

*What moves beside.* Weights that the checkpoint lacks, such as a fresh classification head, are left unquantised and
move by default, whichever way is chosen. Others move where `trainable` names them. With adapters these modules become
peft's `modules_to_save`, so the folder holds all that moved; a weight that has no place there (one of a layer that has
an adapter, a tied one, scales, codes) is refused. Perturbations of all that moves have one size: with the ε of scales,
0.1, a head moves in coarse steps.

A run of `scales` or `codes` reloads with plain `from_pretrained`, with the same logits bit for bit. So does one of
adapters, told how its base was loaded, which the header of its weights says:

```python
from transformers import AutoModelForSequenceClassification
from zowrap.quant import load_options

model = AutoModelForSequenceClassification.from_pretrained("RUN", **load_options("RUN"))
```

Exporting an adapter run to `bf16` or `fp32` writes a full model with the adapters merged in. For a 4-bit base this is
the only way: 4 bits cannot hold the merged weights. `--dtype` is refused for quantised weights: it would round their
scales. An export to `bf16`
or `fp32` rounds no activations: the command loads both models and prints (`logit_error` with `--json`) the root mean
square difference of their outputs on 8 rows of fixed token ids, as a share of the standard deviation of the outputs.
"""

ACCURACY = """## Accuracy and memory

MiniLM (22M weights) on TREC, rule `meazo`, 2,400 forward passes of 16 examples (`python -m benchmarks.quantized run
--data-dir DATA`), test accuracy on 500 rows that nothing was chosen on, ± the standard deviation over seeds.
"""

LM = """Language modelling of SST-2's sentences by a model of 260,000 weights, 600 forward passes of 16, nats a token on
test rows (`python -m benchmarks.quantized run --data-dir DATA --lm DIR`):
"""

MEMORY = """## Peak memory

What a step takes at its peak, above what is held between steps, beside a plain forward with the libraries' own layers;
MiB, of the process's resident set. *Held* adds what the way keeps to the weights. Random weights in the Llama.
(`python -m benchmarks.quantized memory`)
"""

SIXTEEN = """## 16-bit weights

Plain bfloat16 and float16 weights are rounded stochastically by default: the mean of what is written is the update,
however small, and nothing is kept beside the weights. Two options change that:

- `masters=True` (`--masters`) keeps a float32 copy of what moves, 4 bytes a weight, as state of the rule: it is saved
  and resumed with it, and `inspect` counts it. Updates go into the copy, and a weight is its nearest 16-bit number.
- `along="evaluated"` (`--along evaluated`) takes the difference of the two rounded points,
  ẑ = [round(w + εz) − round(w − εz)] / 2ε, in place of z for the update. Where εz is below half a unit in the last
  place, ẑ is 0: such a weight was not moved in the evaluations, which say nothing of it. It costs no memory and two
  roundings in the update's loop. Codes need no such thing: their products are taken at W ± εz unrounded.
"""

SIXTEEN_MEASURED = """`along` is `"drawn"` by default. In language modelling above, `"evaluated"` ends at a lower
loss with each of three seeds at both sizes of ε, by 0.000 to 0.015, less than the seeds differ; on TREC nothing is to
be seen. It matters when some weights are so large that ε is below their last bit; without it those weights drift at
random. On a quadratic of 1,000 weights, three quarters of them about 0 and a quarter about 1, as the gains of
norms are, 6,000 forwards each (`python -m benchmarks.quantized sixteen`):
"""

NOISE = """## The floor under ε

An 8-bit layer rounds its inputs anew in every forward, so the loss is a step function at a fine scale: a difference of
two losses holds a part, *rounding*, that does not shrink with ε. `zowrap.quant.noise_floor(zm, batch)` measures it; the
*floor* is the ε at which the rounding counts as much as the slope. A slope and a floor mean nothing where 2ε · slope is
not above the rounding: there both are chance, and neither is given. Agreement: directions on which the sign of the
projected gradient is the one at another ε. Layers that round no activations (4-bit, torchao) have no such floor, and
no warning comes for them. `zowrap inspect MODEL --load-in-8bit --data FILE` measures it, and warns where ε is below.
12 directions, MiniLM on a batch of 16 of TREC (`python -m benchmarks.quantized noise`).
"""

NOISE_MEANS = """The rounding of scales is 0.03 to 0.04 whatever ε is. It adds 0.035 / 2ε to a projected gradient: 1.8
at ε 0.01, which is most of the 2.2 that the projected gradients of such a run measure, and 0.2 at ε 0.1. Hence the two
rows of scales in the first table, and the default ε of 0.1; below it signs agree no better than by chance. Models whose
loss is less sensitive may take a smaller one. For adapters and codes a large ε meets curvature and a small one the
rounding: signs agree best, on 11 of 12 directions, between 0.03 and 0.01 for adapters and between 0.01 and 0.003 for
codes. The defaults, 0.03 and 0.003, lie at the ends of these, where differences are four to five times the rounding. A
third of each is where a warning comes.
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


def table(lines: list[dict[str, Any]], task: str) -> str:
    """One row for each form: the best rate's mean over seeds; accuracy on TREC, loss in language modelling."""
    from benchmarks.quantized import FORMS, best_rate

    lines = [line for line in lines if line["task"] == task]
    measure, what, more = ("test_accuracy", "accuracy", "") if task == "trec" else ("test_loss", "loss", " --lm DIR")
    rows = [
        f"| form | weights, MiB | what moves | η | {what} before | {what} after | change | seeds | command |",
        "|" + "---|" * 9,
    ]
    for form in FORMS:
        if not any(line["form"] == form for line in lines):
            continue
        rate = best_rate(lines, form, task)
        runs = [line for line in lines if (line["form"], line["lr"]) == (form, rate)]
        after = statistics.fmean(line[measure] for line in runs)
        spread = f" ± {statistics.stdev(line[measure] for line in runs):.3f}" if len(runs) > 1 else ""
        first = runs[0]
        before = first["zero_shot" if task == "trec" else "zero_shot_loss"]
        change = f"{100 * (after - before):+.1f} points" if task == "trec" else f"{after - before:+.3f}"
        rows.append(
            f"| {form} | {first['bytes'] / 2**20:.1f} | {first['elements']:,} | {rate:g} | {before:.3f} | "
            f'{after:.3f}{spread} | {change} | {len(runs)} | `run{more} --only "{form}"` |'
        )
    return "\n".join(rows)


def moved(lines: list[dict[str, Any]]) -> str:
    """What became of the codes, in words."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        if "codes_moved" in line:
            found.setdefault(line["form"], []).append(line["codes_moved"])
    still = [form for form, shares in found.items() if max(most for _, most in shares) == 0]
    text = f"Bit for bit the same after every run: the codes of {', '.join(still)}." if still else ""
    for form, shares in found.items():
        if form not in still:
            text += (
                f" With {form}, {min(least for least, _ in shares):.0%} of the codes or more changed in each matrix."
            )
    return text.strip()


def unmeasured(*figures: list[dict[str, Any]]) -> list[str]:
    """What the commands would measure and the committed figures lack: a section, or nothing."""
    from benchmarks.quantized import FORMS

    cells, memory, sixteen = figures
    missing = []
    for task, name in (("trec", "accuracy on TREC"), ("sst2", "language modelling (`--lm DIR`)")):
        forms = [form for form in FORMS if not any((line["form"], line["task"]) == (form, task) for line in cells)]
        missing += (
            [f"- `run`, {name}: {'; '.join(forms) if len(forms) < len(FORMS) else 'every form'}"] if forms else []
        )
    missing += [] if memory else ["- `memory`: the peak of a step"]
    missing += [] if sixteen else ["- `sixteen`: 16-bit weights on a quadratic"]
    text = "## Not measured yet\n\nNothing is claimed of these; `python -m benchmarks.quantized` makes them:\n\n"
    return [text + "\n".join(missing) + "\n"] if missing else []


def memory_table(lines: list[dict[str, Any]]) -> str:
    """Sizes in MiB; the last column compares the peaks of a step and of a plain forward, the weights included."""
    rows = ["| form | model, batch | weights | held | forward | step | peak of a step |", "|" + "---|" * 7]
    for line in lines:
        sizes = " | ".join(f"{line[name] / 2**20:.1f}" for name in ("weights", "held", "forward", "step"))
        more = (line["held"] + line["step"]) / (line["weights"] + line["forward"]) - 1
        batch = " × ".join(map(str, line["batch"]))
        rows.append(f"| {line['form']} | {line['model']}, {batch} | {sizes} | {more:+.1%} |")
    return "\n".join(rows)


def beside_weights(lines: list[dict[str, Any]]) -> str:
    """What a step takes over the weights alone, where these are large beside the activations."""
    of = {line["form"]: line for line in lines if line["model"] == "llama-130m"}
    shares = [
        f"{(of[form]['held'] + of[form]['step']) / of[form]['weights'] - 1:.1%} for {form}"
        for form in ("int8 scales", "int8 adapters", "int8 codes", "nf4 adapters")
    ]
    return (
        f"Over the weights alone, the whole step of the Llama takes {', '.join(shares)}. MiniLM's weights are small "
        'beside the activations of 512 tokens, of which `paired` holds two streams; `memory="sequential"` holds one.'
    )


def noise_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| form | ε | slope | rounding | floor | agreement |", "|" + "---|" * 6]
    for line in lines:
        slope, floor = ("below rounding" if line[name] is None else f"{line[name]:.2g}" for name in ("slope", "floor"))
        agreement = f"{line['agreement']:.0%} with ε {line['against']:.2g}"
        rows.append(f"| {line['form']} | {line['eps']:g} | {slope} | {line['rounding']:.2g} | {floor} | {agreement} |")
    return "\n".join(rows)


def floor_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| written as | loss left, best η of three |", "|---|---|"]
    return "\n".join([*rows, *(f"| {line['remedy']} | {line['left']:.3f} |" for line in lines)])


def sixteen_table(lines: list[dict[str, Any]]) -> str:
    rows = ["| weights | ε | loss left, best η of three |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {line['way']} | {line['eps']:g} | {line['left']:.3f} |" for line in lines)])


def document(
    cells: list[dict[str, Any]],
    memory: list[dict[str, Any]],
    sixteen: list[dict[str, Any]],
    noise: list[dict[str, Any]],
    floor: list[dict[str, Any]],
) -> str:
    """The page."""
    parts = [HEAD]
    if any(line["task"] == "trec" for line in cells):
        parts.append(ACCURACY + "\n" + table(cells, "trec") + "\n\n" + moved(cells) + "\n")
    parts += unmeasured(cells, memory, sixteen)
    if any(line["task"] == "sst2" for line in cells):
        parts.append(LM + "\n" + table(cells, "sst2") + "\n")
    if memory:
        parts.append(MEMORY + "\n" + memory_table(memory) + "\n\n" + beside_weights(memory) + "\n")
    parts.append(SIXTEEN)
    if sixteen:
        parts.append(SIXTEEN_MEASURED + "\n" + sixteen_table(sixteen) + "\n")
    if noise:
        parts.append(NOISE + "\n" + noise_table(noise) + "\n\n" + NOISE_MEANS)
    parts.append(CODES)
    if floor:
        parts.append(
            f"On a quadratic of 96 × 96 weights, {floor[0]['forwards']:,} forwards each, exact projected gradients "
            "(`python -m benchmarks.quantized floor`):\n\n" + floor_table(floor) + "\n\n" + FLOOR
        )
    return "\n".join(parts)


def write_docs(*figures: list[dict[str, Any]]) -> None:
    """Write the page; the figures as :func:`document` takes them."""
    DOCS.write_text(document(*figures), encoding="utf-8")
