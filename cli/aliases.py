"""The Trainer's spellings of options, accepted but not advertised."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# The Trainer's spellings, accepted but not advertised.
ALIASES = {
    "--learning-rate": "--lr",
    "--max-steps": "--steps",
    "--output-dir": "--out",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--grad-accum",
    "--lr-scheduler-type": "--lr-schedule",
    "--save-steps": "--save-every",
    "--eval-steps": "--eval-every",
}


class AliasCommand(TyperCommand):
    """A command that also takes :data:`ALIASES`, with dashes or underscores."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [unalias(arg) for arg in args])


def unalias(arg: str) -> str:
    """``--learning_rate=1e-3`` → ``--lr=1e-3``."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    name = name.replace("_", "-")
    return f"{ALIASES.get(name, name)}{equals}{value}"
