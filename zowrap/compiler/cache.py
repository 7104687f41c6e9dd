"""Keep compiled code between processes, so that a second start of the same job compiles nothing.

The folder is ``$ZOWRAP_CACHE_DIR``, or ``zowrap`` in the user's cache folder, unless ``$TORCHINDUCTOR_CACHE_DIR`` is
set already. The folder may be deleted at any time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

OURS, TORCHS = "ZOWRAP_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"


def cache_folder() -> Path:
    """The folder for compiled code; not torch's default, a temporary folder that is lost when the machine restarts."""
    if OURS not in os.environ and os.environ.get(TORCHS):
        return Path(os.environ[TORCHS])
    named = os.environ.get(OURS)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zowrap"


def use_cache_folder() -> None:
    """Make torch keep compiled code in :func:`cache_folder`, or in its own default if that cannot be written."""
    chosen = cache_folder()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(chosen, os.W_OK):
        os.environ[TORCHS] = str(chosen)


def remove_broken_library(message: str) -> bool:
    """Remove the compiled library that the message of a failed load names; return whether there was one.

    torch takes every file that exists for a good one, so that every later start would fail on it too.
    """
    folder = Path(os.environ[TORCHS]).resolve()  # torch names its own default there too, once it has compiled
    found = re.search(r"(/[^:\s]+\.so): ", message)
    if found is None or folder not in Path(found[1]).resolve().parents:
        return False
    Path(found[1]).unlink(missing_ok=True)
    return True
