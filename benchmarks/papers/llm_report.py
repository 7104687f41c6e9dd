"""Report the language-model tables next to the papers' own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.papers.common import figure
from benchmarks.papers.llm_run import NAME, TITLE
from benchmarks.papers.spread import mean_and_spread

# What the papers report (accuracy; F1 for squad and drop), as tables of 2305.17333 and averages of 2511.02757 give it.
_OPT_13B = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop")
_ROBERTA = ("sst2", "sst5", "snli", "mnli", "rte", "trec")
REFERENCE = {
    "OPT-13B, MeZO": dict(
        zip(_OPT_13B, (91.4, 66.1, 67.9, 67.6, 63.5, 61.1, 60.1, 88.0, 81.7, 84.7, 30.9), strict=True)
    ),
    "OPT-13B, MeZO LoRA": dict(
        zip(_OPT_13B, (89.6, 67.9, 66.1, 73.8, 64.4, 59.7, 61.5, 84.0, 81.2, 83.8, 31.4), strict=True)
    ),
    "OPT-13B, fine-tuning with Adam": dict(
        zip(_OPT_13B, (92.0, 70.8, 83.9, 77.1, 63.5, 70.1, 71.1, 79.0, 74.1, 84.9, 31.3), strict=True)
    ),
    "RoBERTa-large, k = 512, MeZO": dict(zip(_ROBERTA, (93.3, 53.2, 83.0, 78.3, 78.6, 94.3), strict=True)),
    "RoBERTa-large, k = 512, fine-tuning": dict(zip(_ROBERTA, (93.9, 55.9, 88.7, 84.4, 82.7, 97.3), strict=True)),
}
AVERAGES = "ConMeZO's averages over MeZO's: RoBERTa-large 75.8 → 77.1, OPT-1.3B 61.3 → 61.8, OPT-13B 71.8 → 72.5."


def report(result: dict[str, Any]) -> str:
    settings = result["settings"]
    size = (
        f"k = {settings['per_class']} training and dev examples per class"
        if settings["per_class"]
        else "{} training, {} dev and {} test examples".format(*settings["splits"])
    )
    parts = [
        f"## {NAME}: {TITLE}\n",
        f"{settings['model']}, {settings['tuning']} tuning, {size}; {settings['steps']} steps of "
        f"{settings['batch_size']}, ε {settings['eps']:g}, constant η (best of the grid by dev loss), best of five "
        f"evaluations, {settings['seeds']} seed(s).\n",
        f"| task | metric | rule | best η | obtained | expected: the paper's {_expected_of(settings) or 'has none'} |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["results"]:
        mean, deviation = mean_and_spread([line["score"] for line in entry["seeds"]])
        spread = "" if deviation is None else f" ± {deviation:.1f}"
        expected = _expected(settings, entry["task"])
        parts.append(
            f"| {entry['task']} | {entry['metric']} | `{entry['rule']}` | {entry['seeds'][0]['lr']:g} "
            f"| {mean:.1f}{spread} | {'' if expected is None else expected} |"
        )
    if settings["quick"]:
        parts.append(
            "\nMade with `--quick` on random weights: it shows that the machinery works, and its numbers mean nothing."
        )
    return "\n".join([*parts, "", reference_section()])


def _expected_of(settings: dict[str, Any]) -> str | None:
    """The papers' row for the same kind of model: OPT-13B's, or RoBERTa-large's at k = 512."""
    if settings["family"] == "causal":
        return "OPT-13B, MeZO" if settings["tuning"] == "full" else "OPT-13B, MeZO LoRA"
    return "RoBERTa-large, k = 512, MeZO" if settings["per_class"] == 512 else None


def _expected(settings: dict[str, Any], task: str) -> float | None:
    return REFERENCE.get(_expected_of(settings) or "", {}).get(task)


def reference_section() -> str:
    """The papers' own numbers, to compare the obtained ones with."""
    parts = []
    for tasks, family in ((_OPT_13B, "OPT-13B"), (_ROBERTA, "RoBERTa-large")):
        parts += [f"| {family} | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
        for name, numbers in REFERENCE.items():
            if name.startswith(family):
                parts.append(f"| {name.split(', ', 1)[1]} | {' | '.join(f'{numbers[task]:.1f}' for task in tasks)} |")
        parts.append("")
    return "\n".join([*parts, AVERAGES, ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the obtained scores next to the paper's."""
    entries = result["results"]
    with figure(path, width=max(4.0, 0.9 * len(entries)), height=3.0) as axis:
        axis.bar(
            range(len(entries)), [mean_and_spread([x["score"] for x in e["seeds"]])[0] for e in entries], width=0.6
        )
        for number, entry in enumerate(entries):
            expected = _expected(result["settings"], entry["task"])
            if expected is not None:
                axis.plot([number - 0.4, number + 0.4], [expected] * 2, "k--", linewidth=1)
        axis.set_xticks(range(len(entries)), [f"{e['task']}\n{e['rule']}" for e in entries], fontsize=6)
        axis.set(ylabel="score", title="dashed: MeZO as the paper reports it")
