"""``zowrap rules``: the table of update rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import typer

from .console import result
from .options import Json, takes


@dataclasses.dataclass
class RulesOptions:
    json: Json = False


@takes(RulesOptions)
def rules(context: typer.Context, options: RulesOptions) -> None:
    """List the update rules with their hyper-parameters, memory and forward passes."""
    from zowrap.rules import ALIASES, REGISTRY

    records: list[dict[str, Any]] = []
    lines: list[str] = []
    for name, entry in REGISTRY.items():
        aliases = [alias for alias, target in ALIASES.items() if target == name]
        record = {
            "name": name,
            "aliases": aliases,
            "summary": entry.summary(),
            "hyper": entry.defaults(),
            "memory": entry.memory,
            "forwards": entry.forwards,
            "scale_free": entry.scale_free,
            "paper": entry.paper,
        }
        records.append(record)
        also = f" (also {', '.join(aliases)})" if aliases else ""
        lines.append(f"{name}{also}: {entry.summary()}")
        defaults = ", ".join(f"{key}={value}" for key, value in entry.defaults().items())
        lines.append(f"    {defaults}")
        lines.append(
            f"    state {entry.memory} × the tuned weights, {entry.forwards} forwards per step, arXiv {entry.paper}"
        )
    result({"rules": records}, options.json, lines)
