"""Write docs/quantized.md from the committed figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.quantized.forms import FORMS
from benchmarks.quantized.results import best_rate

DOCS = Path(__file__).parents[2] / "docs" / "quantized.md"

HEAD = """# Quantised models

zowrap tunes weights in 8 or 4 bits without ever making a floating-point copy of the model. (The eager engine, a
reference, is the exception for `codes`: it holds the perturbation of all of them in float32 while it evaluates, and
updates one dequantised matrix after the other, with its directions.) A model comes from
`from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_8bit=True))`, or on the command line from
`--load-in-8bit`. Its quantised layers are replaced, in place and without copying, by plain ones that give the same
outputs bit for bit, and are put back for saving. Supported schemes are bitsandbytes 8-bit (with and without a
threshold) and 4-bit (nf4, fp4, double quantisation), and torchao int8 weight-only (as in torchao itself, one layer at a
time is dequantised). For any other scheme you get an error that names it.

| `quantized=` | what moves | what stays | for |
|---|---|---|---|
| `scales` (default for 8-bit) | one factor per row: scale · exp(s) | the codes | 8-bit |
| `adapters` (default for 4-bit, and with adapters) | LoRA added to the weights | codes and scales | 8- and 4-bit |
| `codes` (experimental) | the integer codes, by stochastic rounding | the scales | bitsandbytes 8-bit |

*Scales* follows QZO (arXiv 2505.13430) in relative form: the probe scale · exp(±εz) and the update
scale · exp(−η·clip(g, ±100)·z) keep every scale positive. Both sides of a direction share one integer
product of a bitsandbytes 8-bit layer, so its codes are read once. `codes` does not work on 4-bit weights, where one
step of a code is up to a quarter of the largest weight of its block. `scales` does not work on 4-bit weights either,
because their block scales are themselves rounded when they are saved or used.

```sh
zowrap tune MODEL --load-in-8bit --data train.jsonl --eval-data dev.jsonl --out RUN            # scales
zowrap tune MODEL --load-in-4bit --use-peft --lora-r 8 --data train.jsonl --out RUN            # adapters on nf4
zowrap inspect MODEL --load-in-8bit             # shows what would move, how and why, and the memory, without weights
zowrap export RUN --to DIR --format bf16        # plain 16-bit weights, for serving engines; prints the error
zowrap export RUN --to DIR --format merged      # merges adapters: dequantise, add, requantise; prints the error
```

**Other weights.** Weights that are missing from the checkpoint, such as those of a new classification head, are not
quantised and move by default in every mode. Name others in `trainable` to tune them as well. With adapters, their
modules become peft's `modules_to_save`, so the folder holds everything that moved; a weight that cannot be saved this
way (one of a layer that has an adapter, a tied one, scales, codes) is an error. All weights that move are perturbed
with the same ε, so with the ε of scales, 0.1, a head moves in coarse steps.

**Loading.** A run of `scales` or `codes` reloads with plain `from_pretrained`, with the same logits bit for bit. A run
of adapters does too, once it is told how its base was loaded, which the header of its weights records:

```python
from transformers import AutoModelForSequenceClassification
from zowrap.quant import load_options

model = AutoModelForSequenceClassification.from_pretrained("RUN", **load_options("RUN"))
```

**Exporting.** Exporting an adapter run to `bf16` or `fp32` writes a full model with the adapters merged in. For a 4-bit
base this is the only way: 4 bits cannot hold the merged weights. `--dtype` is an error for quantised weights, because
it would round their scales. An export to `bf16` or `fp32` no longer rounds activations, so the command loads both
models and prints (`logit_error` with `--json`) the root mean square difference of their outputs on 8 rows of fixed
token ids, as a share of the standard deviation of the outputs.
"""

ACCURACY = """## Accuracy and memory

MiniLM (22M weights) on TREC, rule `meazo`, 2,400 forward passes of 16 examples (`python -m benchmarks.quantized run
--data-dir DATA`), test accuracy on 500 rows that nothing was chosen on, ± the standard deviation over seeds.
"""

LM = """Language modelling of SST-2's sentences with a model of 260,000 weights, 600 forward passes of 16, in nats per
token on test rows (`python -m benchmarks.quantized run --data-dir DATA --lm DIR`):
"""

MEMORY = """## Peak memory

The peak memory of a step and of a plain forward with the libraries' own layers, each above what is held before it; in
MiB of the process's resident set. *Held* is the weights and all that tuning adds to them. The Llama has random weights.
(`python -m benchmarks.quantized memory`)
"""

SIXTEEN = """## 16-bit weights

Plain bfloat16 and float16 weights are rounded stochastically by default: the expected change is the update, however
small it is, and nothing is stored in addition to the weights. Two options change that:

- `masters=True` (`--masters`) keeps a float32 copy of what moves, 4 bytes per weight, in the rule's state: it is saved
  and resumed with it, and `inspect` counts it. Updates go into the copy, and each weight is the nearest 16-bit number.
- `along="evaluated"` (`--along evaluated`) updates along the difference of the two rounded points,
  ẑ = [round(w + εz) − round(w − εz)] / 2ε, instead of z. Where εz is below half a unit in the last place, ẑ is 0: the
  evaluations did not move such a weight, and so say nothing about it. This costs no memory and two roundings per
  element of the update. `codes` do not need it: their products use W ± εz without rounding.
"""

SIXTEEN_MEASURED = """The default is `along="drawn"`. In the language modelling above, `"evaluated"` ends at a lower
loss for each of three seeds and both values of ε, by 0.000 to 0.015, which is less than the seeds differ; on TREC there
is no difference. It matters when some weights are so large that ε is below their last bit; without it those weights
drift at random. This is the result on a quadratic of 1,000 weights, three quarters of them near 0 and a quarter near 1,
like the gains of norms, with 6,000 forwards each (`python -m benchmarks.quantized sixteen`):
"""

NOISE = """## The noise floor of ε

An 8-bit layer rounds its inputs in every forward, so on a fine scale the loss is a step function: a difference of two
losses has a part, the *rounding*, that does not shrink with ε. `zowrap.quant.noise_floor(zm, batch)` measures it. The
*floor* is the ε at which rounding and slope contribute equally. If 2ε · slope is not above the rounding, both slope and
floor would be chance, so neither is given. *Agreement* is the share of directions on which the projected gradients at
two values of ε have the same sign. Layers that do not round activations (4-bit, torchao) have no such floor and cause
no warning. `zowrap inspect MODEL --load-in-8bit --data FILE` measures the floor, and warns if ε is below it. The table
is for 12 directions and MiniLM on a batch of 16 from TREC (`python -m benchmarks.quantized noise`).
"""

NOISE_MEANS = """For scales, the rounding is 0.03 to 0.04 at every ε. It adds 0.035 / 2ε to a projected gradient: 1.8
at ε 0.01, which is most of the 2.2 that the projected gradients of such a run measure, and 0.2 at ε 0.1. This is the
reason for the two rows of scales in the first table, and for the default ε of 0.1, below which signs agree no better
than by chance. Models whose loss is less sensitive may use a smaller ε. For adapters and codes, a large ε meets
curvature and a small one rounding: signs agree best, on 11 of 12 directions, between 0.03 and 0.01 for adapters and
between 0.01 and 0.003 for codes. The defaults, 0.03 and 0.003, are at the ends of these ranges, where differences are
four to five times the rounding. The warning starts at a third of each.
"""

CODES = """## Why codes are experimental

Stochastic rounding is unbiased, but rounding a change Δ (in steps of a code, |Δ| ≪ 1) has a variance
of |Δ|(1 − |Δ|) ≈ |Δ|. Over T updates of η·g·z these add up to T·η·E|g z|, which depends only on Ση: a smaller η with
more steps makes the same noise. After a run, each weight has noise of √(Σ|Δ|) steps, and Σ|Δ| exceeds the progress by
the ratio of |g|·|z| to its useful part, about √d. Fewer and better updates help:

- *q queries per update* average q directions: |Δ| falls by √q, and the number of updates by q for the same number of
  forwards; for the same progress η grows by q, so Σ|Δ| falls by √q.
- *one block per update* (`blocks="layer"`): in a block of d/N elements g is smaller by √N; at η·N the noise summed over
  all elements falls by √N.
"""


FLOOR = """Only many directions per update come near exact arithmetic, hence the warning below `queries=64`. *Held*
directions are kept as (key, number) pairs, added to the weights for each evaluation, and written together. This is
error feedback without a buffer, but it draws all of them again in every forward, and gains no more than queries do.
"""


def form_table(lines: list[dict[str, Any]], task: str) -> str:
    """The table of a task: for each form the mean over seeds at its best rate, as accuracy on TREC or else as loss."""
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


def describe_code_changes(lines: list[dict[str, Any]]) -> str:
    """Describe how many codes changed in the runs."""
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


def list_unmeasured(*figures: list[dict[str, Any]]) -> list[str]:
    """A section on the measurements that the committed figures lack; empty if there are none."""
    cells, memory, sixteen = figures
    missing = []
    for task, name in (("trec", "accuracy on TREC"), ("sst2", "language modelling (`--lm DIR`)")):
        forms = [form for form in FORMS if not any((line["form"], line["task"]) == (form, task) for line in cells)]
        missing += (
            [f"- `run`, {name}: {'; '.join(forms) if len(forms) < len(FORMS) else 'every form'}"] if forms else []
        )
    missing += [] if memory else ["- `memory`: the peak memory of a step"]
    missing += [] if sixteen else ["- `sixteen`: 16-bit weights on a quadratic"]
    text = "## Not measured yet\n\nThese figures are missing; `python -m benchmarks.quantized` makes them:\n\n"
    return [text + "\n".join(missing) + "\n"] if missing else []


def memory_table(lines: list[dict[str, Any]]) -> str:
    """The table of memory in MiB; its last column compares the peaks of a step and of a forward, including weights."""
    rows = ["| form | model, batch | weights | held | forward | step | peak of a step |", "|" + "---|" * 7]
    for line in lines:
        sizes = " | ".join(f"{line[name] / 2**20:.1f}" for name in ("weights", "held", "forward", "step"))
        more = (line["held"] + line["step"]) / (line["weights"] + line["forward"]) - 1
        batch = " × ".join(map(str, line["batch"]))
        rows.append(f"| {line['form']} | {line['model']}, {batch} | {sizes} | {more:+.1%} |")
    return "\n".join(rows)


def describe_step_share(lines: list[dict[str, Any]]) -> str:
    """Describe the memory of a whole step relative to the weights, for a model with small activations."""
    of = {line["form"]: line for line in lines if line["model"] == "llama-130m"}
    shares = [
        f"{(of[form]['held'] + of[form]['step']) / of[form]['weights'] - 1:.1%} for {form}"
        for form in ("int8 scales", "int8 adapters", "int8 codes", "nf4 adapters")
    ]
    return (
        f"The whole step of the Llama takes this much more than its weights: {', '.join(shares)}. MiniLM's weights are "
        "small compared with the activations of 512 tokens, of which `paired` holds those of two points at once and "
        '`memory="sequential"` those of one.'
    )


def noise_table(lines: list[dict[str, Any]]) -> str:
    """The table of noise floors."""
    rows = ["| form | ε | slope | rounding | floor | agreement |", "|" + "---|" * 6]
    for line in lines:
        slope, floor = ("below rounding" if line[name] is None else f"{line[name]:.2g}" for name in ("slope", "floor"))
        agreement = f"{line['agreement']:.0%} with ε {line['against']:.2g}"
        rows.append(f"| {line['form']} | {line['eps']:g} | {slope} | {line['rounding']:.2g} | {floor} | {agreement} |")
    return "\n".join(rows)


def floor_table(lines: list[dict[str, Any]]) -> str:
    """The table of remedies against the noise of codes."""
    rows = ["| updates | remaining loss, best η of three |", "|---|---|"]
    return "\n".join([*rows, *(f"| {line['remedy']} | {line['left']:.3f} |" for line in lines)])


def sixteen_table(lines: list[dict[str, Any]]) -> str:
    """The table of 16-bit weights."""
    rows = ["| weights | ε | remaining loss, best η of three |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {line['way']} | {line['eps']:g} | {line['left']:.3f} |" for line in lines)])


def document(
    cells: list[dict[str, Any]],
    memory: list[dict[str, Any]],
    sixteen: list[dict[str, Any]],
    noise: list[dict[str, Any]],
    floor: list[dict[str, Any]],
) -> str:
    """The page as Markdown."""
    parts = [HEAD]
    if any(line["task"] == "trec" for line in cells):
        parts.append(ACCURACY + "\n" + form_table(cells, "trec") + "\n\n" + describe_code_changes(cells) + "\n")
    parts += list_unmeasured(cells, memory, sixteen)
    if any(line["task"] == "sst2" for line in cells):
        parts.append(LM + "\n" + form_table(cells, "sst2") + "\n")
    if memory:
        parts.append(MEMORY + "\n" + memory_table(memory) + "\n\n" + describe_step_share(memory) + "\n")
    parts.append(SIXTEEN)
    if sixteen:
        parts.append(SIXTEEN_MEASURED + "\n" + sixteen_table(sixteen) + "\n")
    if noise:
        parts.append(NOISE + "\n" + noise_table(noise) + "\n\n" + NOISE_MEANS)
    parts.append(CODES)
    if floor:
        parts.append(
            f"On a quadratic of 96 × 96 weights, with {floor[0]['forwards']:,} forwards each and exact projected "
            "gradients (`python -m benchmarks.quantized floor`):\n\n" + floor_table(floor) + "\n\n" + FLOOR
        )
    return "\n".join(parts)


def write_docs(*figures: list[dict[str, Any]]) -> None:
    """Write the page; the figures as :func:`document` takes them."""
    DOCS.write_text(document(*figures), encoding="utf-8")
