"""Report E6: its section of the documentation and its figure, from its JSON only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.papers.common import figure
from benchmarks.papers.e6_run import NAME, RULES, TITLE, rules_of
from benchmarks.papers.finetune import VARIANTS
from benchmarks.papers.llm_report import reference_section
from benchmarks.papers.spread import mean_and_spread

Facts = dict[str, Any]

# What each rule's paper reports against MeZO (zo_sgd) on language models, at equal forwards.
CLAIMS = {
    "zo_sgd": "the baseline",
    "zo_adam": "about as MeZO",
    "radazo": "faster than ZO-AdaMM at a common η",
    "meazo": "as ZO-Adam, without its state",
    "conmezo": "RoBERTa-large +1.3, OPT-1.3B +0.5 points on average",
    "lozo": "as MeZO or better",
    "sparse_mezo": "better than MeZO",
    "meazo_blocks": "as many steps as MeZO, each cheaper (MeZO-BCD)",
}


def report(result: dict[str, Any]) -> str:
    settings = result["settings"]
    parts = [
        f"## {NAME}: {TITLE}\n",
        command(NAME, result),
        _set_up(settings),
        *(_task(result, task) for task in result["tasks"]),
    ]
    if result["missing"]:
        parts.append(f"Not in this version of zowrap, and left out: {', '.join(result['missing'])}.\n")
    parts.append(_large_models())
    if settings["quick"]:
        parts.append("Made with `--quick`: this shows the machinery and says nothing about the rules.\n")
    return "\n".join(parts)


def command(name: str, result: Facts) -> str:
    """The command that makes the result, with its time and versions."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"`python -m benchmarks.papers {name}` (one thread; {versions})\n"


def _set_up(settings: dict[str, Any]) -> str:
    model = "MiniLM (22.7M weights; the 10.6M of its layers' matrices move)" if settings["model"] == "minilm" else ""
    return (
        f"Model: {model or settings['model']}, classes by cosine with the label names, as `zowrap tune` does. Batch "
        f"{settings['batch_size']}, ε {settings['eps']:g}, gaussian directions, one query, central differences, "
        f"constant η, texts cut to {settings['max_length']} tokens, float32. η comes from a grid of half decades on "
        f"seed 0 (lowest loss on dev rows held out of the training set; the grid grows if its best value is at an "
        f"end), and seeds 0 to {settings['seeds'] - 1} run at that η. Accuracy is that of the last step, on test rows "
        f"that nothing was chosen on. Every rule has the same forwards, batches and seeds.\n"
    )


def _large_models() -> str:
    return (
        "### The papers' tables on large models\n\n"
        "`python -m benchmarks.papers llm --model facebook/opt-1.3b --tasks sst2 rte --rules zo_sgd conmezo` runs the "
        "papers' tables (OPT-1.3B and 13B, RoBERTa-large, with their prompts, splits, grids and steps) if you have the "
        "models. **We have not made those runs**: we tried the command only on tiny random models. For comparison, the "
        f"papers report:\n\n{reference_section()}"
    )


def _task(result: dict[str, Any], task: str) -> str:
    facts, comparison = result["tasks"][task], result["comparison"][task]
    rules = rules_of(facts)
    if not rules:
        return f"### {task}\n\nNothing was run.\n"
    line, untuned = facts["rules"][rules[0]]["seeds"][0], facts["untuned"]
    return "\n".join(
        (
            f"### {task}: {facts['steps']} steps, {line['forwards']} forwards\n",
            f"{line['dev_rows']} dev rows, {line['test_rows']} test rows. Before tuning: accuracy "
            f"{untuned['test_accuracy']:.3f} on test, {untuned['dev_accuracy']:.3f} on dev, dev loss "
            f"{untuned['dev_loss']:.2f}.\n",
            _accuracy_table(facts, rules, comparison),
            _grid_table(facts, rules),
            _conclusion(facts, rules, comparison),
            *([f"Not measured: {_listed(facts['unfinished'])}.\n"] if facts["unfinished"] else []),
        )
    )


def _accuracy_table(facts: Facts, rules: Sequence[str], comparison: dict[str, Any]) -> str:
    goal = target(facts)
    wanted = "forwards to dev accuracy (no rule gained any)" if goal is None else f"forwards to dev accuracy {goal:.3f}"
    base = comparison["test_accuracy"]["baseline"]
    rows = [
        f"| rule | expected (the papers) | best η | test accuracy | by seed | against {base} "
        f"| dev loss | against {base} | {wanted} | CPU s a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rule in rules:
        seeds = facts["rules"][rule]["seeds"]
        points = comparison["test_accuracy"]["differences"].get(rule)
        nats = comparison["dev_loss"]["differences"].get(rule)
        entries = (
            label(rule),
            CLAIMS.get(rule, ""),
            f"{seeds[0]['lr']:g}",
            _mean([line["test_accuracy"] for line in seeds]),
            ", ".join(f"{line['test_accuracy']:.3f}" for line in seeds),
            "" if points is None else f"{100 * points:+.1f} points",
            _mean([line["dev_loss"] for line in seeds]),
            "" if nats is None else f"{nats:+.3f}",
            _forwards(forwards_to(mean_curve(seeds), goal)),
            f"{_cost(facts['rules'][rule]):.2f}",
        )
        rows.append(f"| {' | '.join(entries)} |")
    return "\n".join(rows) + "\n"


def _mean(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return "not finite"
    mean, deviation = mean_and_spread(there)
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _cost(found: Facts) -> float:
    """CPU seconds of a step in the fastest run: the machine may have been busy in the others."""
    return min(line["cpu_seconds"] / line["steps"] for line in (*found["grid"], *found["seeds"]))


def _grid_table(facts: Facts, rules: Sequence[str]) -> str:
    """Seed 0 over η: down a column the rules at a common η, along a row the grid of one rule."""
    rates = sorted({line["lr"] for rule in rules for line in facts["rules"][rule]["grid"]})
    head = ["Seed 0 at every η of the grids, test accuracy (dev loss); a column compares rules at a common η:\n"]
    head += [f"| rule | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    rows = []
    for rule in rules:
        by_rate = {line["lr"]: line for line in facts["rules"][rule]["grid"]}
        best = facts["rules"][rule]["seeds"][0]["lr"]
        rows.append(f"| {label(rule)} | {' | '.join(_grid_entry(by_rate.get(rate), best) for rate in rates)} |")
    return "\n".join([*head, *rows]) + "\n"


def _grid_entry(line: dict[str, Any] | None, best: float) -> str:
    if line is None:
        return ""
    loss = "not finite" if line["dev_loss"] is None else f"{line['dev_loss']:.2f}"
    text = f"{line['test_accuracy']:.3f} ({loss})"
    return f"**{text}**" if line["lr"] == best else text


def _conclusion(facts: Facts, rules: Sequence[str], comparison: dict[str, Any]) -> str:
    """The conclusions that the numbers support, in sentences."""
    means = {rule: fmean(line["test_accuracy"] for line in facts["rules"][rule]["seeds"]) for rule in rules}
    highest, untuned = max(means, key=lambda rule: means[rule]), facts["untuned"]["test_accuracy"]
    text = (
        f"Conclusion: test accuracy is {untuned:.3f} before tuning; after it, the rules' means range from "
        f"{min(means.values()):.3f} to {means[highest]:.3f}, which is {label(highest)}'s. "
    )
    if comparison["test_accuracy"]["threshold"] is None:
        return text + "One seed says nothing about differences.\n"
    text += (
        "Runs with the same seed share batches and noise, so the effect of the seed is removed before comparing rules. "
    )
    accuracy = {**comparison["test_accuracy"], "unit": " points", "scale": 100.0, "sign": 1.0}
    loss = {**comparison["dev_loss"], "unit": "", "scale": 1.0, "sign": -1.0}
    return f"{text}{_verdict('Test accuracy', accuracy)} {_verdict('Dev loss', loss)}\n"


def _verdict(measure: str, found: dict[str, Any]) -> str:
    """Name the rules that differ from the baseline in one measure by more than the spread."""
    if found["threshold"] is None:
        return f"{measure}: nothing to compare."
    gains = {rule: found["sign"] * difference for rule, difference in found["differences"].items()}
    better = [rule for rule, gain in gains.items() if gain > found["threshold"]]
    worse = [rule for rule, gain in gains.items() if gain < -found["threshold"]]
    same = [rule for rule in gains if rule not in (*better, *worse)]
    said = [
        f"{how} {found['baseline']}: {_listed(group)}"
        for how, group in (("better than", better), ("worse than", worse), ("not distinguishable from", same))
        if group
    ]
    digits = 1 if found["unit"] else 3
    return (
        f"{measure} (single runs spread by {found['scale'] * found['spread']:.{digits}f}{found['unit']}; a difference "
        f"counts from {found['scale'] * found['threshold']:.{digits}f} on): {'; '.join(said)}."
    )


def label(rule: str) -> str:
    """``meazo_blocks`` → ``meazo, blocks="layer"``."""
    if rule not in VARIANTS:
        return f"`{rule}`"
    given = VARIANTS[rule]
    options = ", ".join(f"{k}={v!r}" for k, v in {**given.hyper, **given.wrap}.items())
    return f"`{given.rule}` with {options}".replace("'", '"')


def _listed(rules: Sequence[str]) -> str:
    names = [label(rule) for rule in rules]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def target(facts: Facts) -> float | None:
    """Halfway from the untuned dev accuracy to the best rule's; None where no rule gained any."""
    start = facts["untuned"]["dev_accuracy"]
    best = max(mean_curve(found["seeds"])[-1][1] for found in facts["rules"].values())
    return (start + best) / 2 if best > start else None


def mean_curve(seeds: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(forwards, dev accuracy averaged over the seeds)."""
    return [
        (points[0]["forwards"], fmean(point["accuracy"] for point in points))
        for points in zip(*(line["curve"] for line in seeds), strict=True)
    ]


def forwards_to(curve: Sequence[tuple[int, float]], goal: float | None) -> int | None:
    """Forwards at which the curve first reaches the goal, between evaluations by a straight line; None if never."""
    for (before, low), (after, high) in pairwise(curve):
        if goal is not None and low < goal <= high:
            return round(before + (after - before) * (goal - low) / (high - low))
    return None


def _forwards(count: int | None) -> str:
    return "not reached" if count is None else str(count)


def plot(result: dict[str, Any], path: Path) -> None:
    tasks = result["tasks"]
    with figure(path, rows=len(tasks), columns=2, height=3.0) as axes:
        for (left, right), (task, facts) in zip(axes, tasks.items(), strict=True):
            for rule in rules_of(facts):
                color = f"C{RULES.index(rule)}" if rule in RULES else None
                curve = mean_curve(facts["rules"][rule]["seeds"])
                (line,) = left.plot([x for x, _ in curve], [y for _, y in curve], "o-", ms=3, label=rule, color=color)
                grid = [line for line in facts["rules"][rule]["grid"] if line["dev_loss"] is not None]
                rates, losses = [x["lr"] for x in grid], [x["dev_loss"] for x in grid]
                right.semilogx(rates, losses, "o-", ms=3, color=line.get_color())
            untuned = facts["untuned"]["dev_loss"]
            right.axhline(untuned, color="grey", linestyle=":")
            right.set(
                xlabel="η", ylabel="dev loss, seed 0", ylim=(None, 1.3 * untuned), title=f"{task} (dotted: untuned)"
            )
            left.set(xlabel="forwards", ylabel="dev accuracy, mean of seeds", title=task)
            left.legend(fontsize=6)
