"""Summarise a run and how sure its figures are: facts for ``--json``, and lines for people.

The best of several evaluations on the rows that it was chosen by looks like a gain even where nothing changed. So a
gain is claimed only where more rows got better than worse beyond chance, with the number of evaluations allowed for
(:func:`zowrap.numerics.intervals.is_beyond_chance`), and figures of rows that chose nothing stand apart.
"""

from __future__ import annotations

import math
from typing import Any

from zowrap.numerics.intervals import is_beyond_chance

FIGURES = ("loss", "accuracy")


def dev_facts(evaluations: list[dict[str, Any]], best: int | None, metric: str) -> dict[str, Any]:
    """The facts about the figures on the evaluation data.

    Args:
        evaluations: lines of metrics.jsonl.
        best: step of the model that was kept.
        metric: what it was chosen by, ``"accuracy"`` or ``"loss"``.
    """
    final: dict[str, Any] = next((e for e in reversed(evaluations) if best is None or e["step"] == best), {})
    first: dict[str, Any] = next((e for e in evaluations if e["step"] == 0), {})
    rows = final.get("eval_rows") or {}
    later = sum(e["step"] > 0 for e in evaluations)
    facts: dict[str, Any] = {"metric": metric if evaluations else None, "evaluations": len(evaluations)}
    for name in FIGURES:
        before, after = first.get(f"eval_{name}"), final.get(f"eval_{name}")
        change = _change(name, before, after, rows.get(name) or {}, later) if best else None
        facts |= {
            f"{name}_before": before,
            f"{name}_interval": (rows.get(name) or {}).get("interval"),
            f"{name}_improved": False if best == 0 else None if change is None else change == "better",
        }
    facts["dev_examples"] = (rows.get("loss") or rows.get("accuracy") or {}).get("rows")
    facts["improved"] = facts[f"{metric}_improved"]
    facts["best_is_last"] = bool(best) and evaluations[-1]["step"] == best
    return facts


def unseen_facts(before: dict[str, Any], after: dict[str, Any], rows: dict[str, Any], metric: str) -> dict[str, Any]:
    """The same of rows that chose nothing.

    Args:
        before, after: loss and accuracy of the untuned model and of the one that was kept; empty where not known.
        rows: how sure the latter are, see :func:`zowrap.loss.evaluation.measure_certainty`.
    """
    facts: dict[str, Any] = {}
    for name in FIGURES:
        facts |= {
            f"test_{name}": after.get(name),
            f"test_{name}_before": before.get(name),
            f"test_{name}_interval": (rows.get(name) or {}).get("interval"),
        }
    change = _change(metric, before.get(metric), after.get(metric), rows.get(metric) or {}, 1)
    facts |= {"test_examples": after.get("examples"), "test_change": change}
    return {**facts, "test_improved": None if change is None else change == "better"}


def _change(name: str, before: float | None, after: float | None, rows: dict[str, Any], best_of: int) -> str | None:
    """``"better"`` or ``"worse"`` beyond chance, else ``"noise"``; None where the rows cannot be compared."""
    better, worse = rows.get("better"), rows.get("worse")
    if before is None or after is None or better is None or worse is None:
        return None
    gain = before - after if name == "loss" else after - before
    if gain > 0 and is_beyond_chance(better, worse, best_of):
        return "better"
    return "worse" if gain < 0 and is_beyond_chance(worse, better, best_of) else "noise"


def lines(record: dict[str, Any]) -> list[str]:
    """The outcome for people: the first line says what was reached, the others how much of it to believe."""
    parts = [f"{record['out']}: {record['steps']} steps", *_figures(record, "")]
    best, count = record.get("best_step"), record.get("evaluations")
    if best is not None:
        rows = f" on {record['dev_examples']} rows" if record.get("dev_examples") else ""
        of = f", the best of {count} evaluations{rows}" if count else ""
        parts.append(f"best on dev at step {best}{of}")
    if record.get("full_rows"):
        parts.append(f"{record['full_rows']:,} rows of codes are full: they end at ±127")
    found = [", ".join(parts), _dev(record), _test(record)]
    if record.get("best_is_last") and count and count > 1:
        noise = record.get("improved") is False
        still = "the last evaluation was the best" if noise else "still improving at the last evaluation"
        found.append(f"{still}: more --steps may help")
    return [line for line in found if line]


def _figures(record: dict[str, Any], prefix: str) -> list[str]:
    """``accuracy 0.4000 → 0.4900 (95 %: 0.3942 to 0.5865)`` and the like."""
    parts = []
    for name in FIGURES:
        before, after = record.get(f"{prefix}{name}_before"), record.get(f"{prefix}{name}")
        if after is not None:
            parts.append(f"{name} {after:.4f}" if before is None else f"{name} {before:.4f} → {after:.4f}")
            parts[-1] += spread(record.get(f"{prefix}{name}_interval"))
    return parts


def spread(interval: list[float] | tuple[float, float] | None) -> str:
    """A 95 % interval in brackets, with a space before it; nothing where there is none."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" (95 %: {interval[0]:.4f} to {interval[1]:.4f})"


def _dev(record: dict[str, Any]) -> str | None:
    """Say whether the gain on the evaluation data is beyond chance."""
    metric, improved = record.get("metric"), record.get("improved")
    if improved is None:
        return None
    if record.get("best_step") == 0:
        return "no improvement: no evaluation was better than the untuned model's, which is kept"
    if improved:
        return f"{metric} on dev improved beyond noise, the choice of the best evaluation allowed for"
    fell = ", though the loss fell" if metric == "accuracy" and record.get("loss_improved") else ""
    return f"no improvement beyond noise in {metric} on dev{fell}: the best of several evaluations looks like a gain"


def _test(record: dict[str, Any]) -> str | None:
    """The figures on rows that chose nothing."""
    figures = _figures(record, "test_")
    if not figures:
        return None
    said = {"better": "improved beyond noise", "worse": "worse beyond noise", "noise": "no improvement beyond noise"}
    change = said.get(record.get("test_change") or "")
    text = f"test, {record['test_examples']} rows that chose nothing: {', '.join(figures)}"
    return text if change is None else f"{text}: {change}"
