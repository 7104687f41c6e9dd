"""One-line messages to the person who started a run."""

from __future__ import annotations

import sys


def say(sentence: str) -> None:
    """Print a line on standard error: standard output is left to results."""
    print(sentence, file=sys.stderr, flush=True)
