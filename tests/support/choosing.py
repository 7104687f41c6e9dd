"""Choose among the names of a command of the tests by patterns with ``*`` and ``?``."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterable, Sequence


def choose_names(
    parser: argparse.ArgumentParser, names: Iterable[str], patterns: Sequence[str], what: str
) -> list[str]:
    """Choose the names that match a pattern, all of them without patterns; end with the parser's error if none does."""
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ["*"])]
    if not chosen:
        parser.error(f"no {what} matches {' '.join(patterns)}")
    return chosen
