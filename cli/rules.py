"""``zowrap rules``: the table of update rules, with the memory of each measured on the spot."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING, Any

import typer

from zowrap.cli.console import result, say
from zowrap.cli.options import Json, Plugin, load_plugins, takes

if TYPE_CHECKING:
    from zowrap.rules.entry import Entry


@dataclasses.dataclass
class RulesOptions:
    plugin: Plugin = dataclasses.field(default_factory=list)
    json: Json = False


@takes(RulesOptions)
def rules(context: typer.Context, options: RulesOptions) -> None:
    """List the update rules: state, memory, forward passes, hyper-parameters and source."""
    load_plugins(options.plugin)
    from zowrap.bench.rule_memory import measure_extra_memory
    from zowrap.rules.entry_points import load_installed
    from zowrap.rules.registry import REGISTRY

    for sentence in load_installed():
        say(f"warning: {sentence}")
    measured = measure_extra_memory([entry.constructor() for entry in REGISTRY.values()])
    records = [_record(name, entry, held) for (name, entry), held in zip(REGISTRY.items(), measured, strict=True)]
    result({"rules": records}, options.json, [] if options.json else _lines(records))


def _record(name: str, entry: Entry, held: float) -> dict[str, Any]:
    from zowrap.rules.registry import ALIASES

    rule = entry.constructor()
    return {
        "name": name,
        "aliases": [alias for alias, target in ALIASES.items() if target == name],
        "summary": entry.summary(),
        "hyper": entry.defaults(),
        "state": list(rule.slots),
        "scalars": list(rule.state),
        "memory": entry.memory,
        "memory_measured": round(held, 4),
        "forwards": entry.forwards,
        "scale_free": entry.scale_free,
        "paper": entry.paper,
    }


def _lines(records: list[dict[str, Any]]) -> list[str]:
    """A table of costs, then what each rule is and its defaults."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("rule", "state", "memory", "measured", "forwards", "scale-free", "source"):
        table.add_column(heading, no_wrap=True)
    for each in records:
        table.add_row(
            each["name"],
            ", ".join(each["state"] + [f"({name})" for name in each["scalars"]]) or "none",
            each["memory"],
            f"{each['memory_measured']:.2f}",
            each["forwards"],
            "yes" if each["scale_free"] else "no",
            each["paper"],
        )
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    lines += [
        "",
        "state: kept for every weight in float32; in parentheses, one number for each block.",
        "memory: of the state, in units of the tuned weights in float32; measured: bytes held after a step beyond the",
        "model, just now on one matrix. forwards: a step's, with q queries. source: arXiv number or as registered.",
    ]
    for each in records:
        also = f" (also {', '.join(each['aliases'])})" if each["aliases"] else ""
        defaults = ", ".join(f"{key}={value}" for key, value in each["hyper"].items())
        lines += ["", f"{each['name']}{also}: {each['summary']}", f"    {defaults}"]
    return lines
