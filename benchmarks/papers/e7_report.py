"""Report E7: its section of the documentation and its figure, from its JSON only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.papers.common import figure
from benchmarks.papers.e6_report import command, label
from benchmarks.papers.e7_run import NAME, TITLE
from benchmarks.papers.spread import mean_and_spread

NEAR = 0.1  # of the dev loss that a rule takes off at its best η: what "robust" is counted by


def report(result: dict[str, Any]) -> str:
    parts = [
        f"## {NAME}: {TITLE}\n",
        command(NAME, result),
        _set_up(result["settings"]),
        _second_moment(result),
        _momentum(result),
        _robustness(result),
        _heat(result),
        _directions(result),
    ]
    if result["settings"]["quick"]:
        parts.append("Made with `--quick`: this shows the machinery and says nothing about the rules.\n")
    return "\n".join(parts)


def _set_up(settings: dict[str, Any]) -> str:
    model = "MiniLM" if settings["model"] == "minilm" else settings["model"]
    return (
        f"{model} on {settings['task']}, runs as in E6 (batch {settings['batch_size']}, {settings['steps']} steps "
        f"unless stated otherwise, η by E6's grid). ∇f is the gradient of the mean loss on "
        f"{settings['reference_rows']} fixed training rows, computed by backpropagation at the weights before the step "
        f"and not used for training. Alignment and v are measured at every {settings['every']}th of "
        f"{settings['trace_steps']} steps with seed 0.\n"
    )


def _second_moment(result: dict[str, Any]) -> str:
    looks = result["second_moment"]
    last = looks[-1]
    ratio = last["v"] / last["noise"]
    alike = abs(ratio - 1) < 0.05
    said = "v distinguishes the coordinates no better than" if alike else "v differs from what"
    return "\n".join(
        (
            "### Coefficient of variation of ZO-Adam's v\n",
            "If all coordinates were alike, v would still vary with the noise of the directions, because z² is χ²; "
            "that coefficient follows from the projected gradients. Expected: v shows only this noise, far less than "
            "the variation of the squares of the gradient.\n",
            "| step | v, obtained | v if all coordinates were alike (expected) | squares of ∇f |",
            "|---|---|---|---|",
            *(f"| {x['step']} | {x['v']:.3f} | {x['noise']:.3f} | {x['gradient']:.1f} |" for x in looks),
            f"\nConclusion: at step {last['step']} the ratio to the noise is {ratio:.3f}: {said} noise would, while "
            f"the squares of the true gradient vary by {last['gradient']:.1f}.\n",
        )
    )


def _momentum(result: dict[str, Any]) -> str:
    rows, verdicts = [], []
    for rule, found in result["momentum"].items():
        looks = found["looks"]
        m, gz = (fmean(look[name] for look in looks) for name in ("m", "gz"))
        ahead = sum(look["m"] > look["gz"] for look in looks)
        factor = f"{m / gz:.1f}" if gz > 0 else "none: g z points away"
        limit = math.sqrt((1 + found["beta"]) / (1 - found["beta"]))
        rows.append(
            f"| `{rule}` | {found['beta']:g} | {gz:.2e} | {m:.2e} | {factor} | {limit:.1f} | {ahead} of {len(looks)} |"
        )
        verdicts.append(f"{'better' if m > gz else 'not better'} for `{rule}`")
    return "\n".join(
        (
            "### Alignment with the gradient: m against g z\n",
            "Expected: m is better aligned. With independent directions and a constant gradient the factor tends to "
            "√((1+β)/(1−β)); ConMeZO's directions also depend on m.\n",
            "| rule | β | mean cos(g z, ∇f) | mean cos(m, ∇f) | factor, obtained | limit | m ahead at |",
            "|---|---|---|---|---|---|---|",
            *rows,
            f"\nConclusion: on average m is {' and '.join(verdicts)}.\n",
        )
    )


def _robustness(result: dict[str, Any]) -> str:
    rows, widths = [], {}
    for rule, lines in result["robustness"].items():
        widths[rule] = usable(lines)
        entries = ", ".join(f"{line['lr']:g}: {_both(line)}" for line in lines)
        rows.append(f"| `{rule}` | {entries} | {len(widths[rule])} of {len(lines)} |")
    widest = max(len(width) for width in widths.values())
    names = [f"`{rule}`" for rule, width in widths.items() if len(width) == widest]
    outcome = (
        "all three have the same number of usable step sizes on this grid, so it shows no difference in robustness"
        if len(names) == len(widths)
        else f"the most usable step sizes, {widest}, are those of {' and '.join(names)}"
    )
    return "\n".join(
        (
            "### Robustness in η\n",
            "Expected (E3a): rules that divide by the size of the estimate are as good at their best η, and usable "
            f"over more of the grid. An η is usable if the dev loss falls by at least {1 - NEAR:.0%} of its fall at "
            "the best η. Seed 0.\n",
            "| rule | η: dev loss (dev accuracy) | usable |",
            "|---|---|---|",
            *rows,
            f"\nConclusion: {outcome}. The grid has steps of half a decade, so a difference of one is within its "
            "resolution.\n",
        )
    )


def usable(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Step sizes of a grid at which the dev loss falls nearly as far as at the best one."""
    start = lines[0]["curve"][0]["loss"]
    falls = {line["lr"]: start - line["dev_loss"] for line in lines if line["dev_loss"] is not None}
    most = max(falls.values(), default=0.0)
    return [lr for lr, fall in falls.items() if most > 0 and fall >= (1 - NEAR) * most]


def _heat(result: dict[str, Any]) -> str:
    heat = result["heat"]
    flat = [
        (line, theta, beta)
        for beta, row in zip(heat["betas"], heat["lines"], strict=True)
        for theta, line in zip(heat["thetas"], row, strict=True)
    ]
    best, theta, beta = min(flat, key=lambda entry: _rank(entry[0]))
    plain = heat["mezo"]
    compared = "lower than" if _rank(best) < _rank(plain) else "not lower than"
    return "\n".join(
        (
            "### ConMeZO over θ and β\n",
            f"Dev loss (accuracy) after {result['settings']['heat_steps']} steps at η = {heat['lr']:g}, seed 0. "
            f"Expected: a cone helps over MeZO (θ = π/2), best near θ 1.35 and β 0.95 to 0.99.\n",
            f"| β \\ θ | {' | '.join(f'{t:g}' for t in heat['thetas'])} |",
            "|---" * (len(heat["thetas"]) + 1) + "|",
            *(
                f"| {b:g} | {' | '.join(map(_both, row))} |"
                for b, row in zip(heat["betas"], heat["lines"], strict=True)
            ),
            f"\nMeZO, the same η: {_both(plain)}.\n",
            f"Conclusion: the lowest loss is at θ = {theta:g}, β = {beta:g}, {compared} MeZO's. This is a single "
            "seed: E6's spread over seeds shows how little a small difference means.\n",
        )
    )


def _directions(result: dict[str, Any]) -> str:
    directions = result["directions"]
    rows = []
    means = {}
    for name, run in directions["runs"].items():
        mean, deviation = mean_and_spread([line["test_accuracy"] for line in run["seeds"]])
        loss = fmean(math.inf if line["dev_loss"] is None else line["dev_loss"] for line in run["seeds"])
        means[name] = loss
        spread = "" if deviation is None else f" ± {deviation:.3f}"
        gain = f"{run['gain']:.2f}"
        if run["most_gain"] > run["least_gain"]:
            gain += f" ({run['least_gain']:.2f} to {run['most_gain']:.2f})"
        rows.append(
            f"| {name} | {label(run['rule'])} | {run['seeds'][0]['lr']:g} | {mean:.3f}{spread} | {loss:.3f} "
            f"| {run['stable_rank']:.3g} | {run['overlap']:.3g} | {gain} |"
        )
    best = min(means, key=lambda name: means[name])
    aligned = max(directions["runs"], key=lambda name: directions["runs"][name]["gain"])
    return "\n".join(
        (
            "### Full, sparse, low-rank and block directions\n",
            f"Equal forwards, η by a grid for each, d = {directions['count']:,}. Stable rank is tr C / ‖C‖ and "
            "effective overlap ∇fᵀC∇f / (‖C‖‖∇f‖²) for C = E[zzᵀ] given the step's subspace (our reading of "
            "2501.19099), at the checkpoint's weights; gain is overlap · d / stable rank, the expected squared cosine "
            "of an estimate with ∇f in units of the full space's. Expected: subspaces drawn without regard to the "
            "gradient have gain 1 and converge equally fast.\n",
            "| directions | rule | best η | test accuracy | dev loss | stable rank | overlap | gain (over blocks) |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            f"\nConclusion: the lowest dev loss is that of {best} directions, the largest gain that of {aligned} ones"
            f"{': the two agree' if best == aligned else ': the gain alone does not decide'}.\n",
        )
    )


def _rank(line: dict[str, Any]) -> float:
    return math.inf if line["dev_loss"] is None else line["dev_loss"]


def _loss(line: dict[str, Any]) -> str:
    return "not finite" if line["dev_loss"] is None else f"{line['dev_loss']:.2f}"


def _both(line: dict[str, Any]) -> str:
    return f"{_loss(line)} ({line['dev_accuracy']:.3f})"


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, rows=2, columns=2, height=3.0) as ((cosines, variation), (robust, cone)):
        for number, (rule, found) in enumerate(result["momentum"].items()):
            steps, color = [look["step"] for look in found["looks"]], f"C{number}"
            cosines.plot(steps, [look["m"] for look in found["looks"]], "o-", color=color, ms=3, label=f"m, {rule}")
            cosines.plot(steps, [look["gz"] for look in found["looks"]], "--", color=color, label=f"g z, {rule}")
        cosines.set(xlabel="step", ylabel="cosine with ∇f")
        cosines.legend(fontsize=6)
        looks = result["second_moment"]
        for name, text in (("v", "v of ZO-Adam"), ("noise", "v if all were alike"), ("gradient", "squares of ∇f")):
            variation.semilogy([x["step"] for x in looks], [x[name] for x in looks], "o-", ms=3, label=text)
        variation.set(xlabel="step", ylabel="coefficient of variation")
        variation.legend(fontsize=6)
        for rule, lines in result["robustness"].items():
            best = min(lines, key=_rank)["lr"]
            there = [line for line in lines if line["dev_loss"] is not None]
            robust.semilogx([x["lr"] / best for x in there], [x["dev_loss"] for x in there], "o-", ms=3, label=rule)
        robust.set(xlabel="η / best η", ylabel="dev loss, seed 0")
        robust.legend(fontsize=6)
        _draw_heat(cone, result["heat"])


def _draw_heat(axis: Any, heat: dict[str, Any]) -> None:
    values = [[math.nan if line["dev_loss"] is None else line["dev_loss"] for line in row] for row in heat["lines"]]
    axis.pcolormesh(values, cmap="viridis_r")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white")
    axis.set_xticks([j + 0.5 for j in range(len(heat["thetas"]))], [f"{t:g}" for t in heat["thetas"]])
    axis.set_yticks([i + 0.5 for i in range(len(heat["betas"]))], [f"{b:g}" for b in heat["betas"]])
    axis.set(xlabel="θ", ylabel="β", title="ConMeZO, dev loss")
