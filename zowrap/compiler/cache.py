"""Where compiled code is kept between processes: a second start of the same job compiles nothing.

The folder is ``$ZOWRAP_CACHE_DIR``, or ``zowrap`` in the user's cache folder; a ``$TORCHINDUCTOR_CACHE_DIR`` that is
set already stays in force. It may be deleted at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

OURS, TORCHS = "ZOWRAP_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"


def folder() -> Path:
    """The folder in use. Torch's own lies among the temporary files, which a restart of the machine empties."""
    if OURS not in os.environ and os.environ.get(TORCHS):
        return Path(os.environ[TORCHS])
    named = os.environ.get(OURS)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zowrap"


def use() -> None:
    """Have torch keep its compiled code there. A folder that cannot be written to leaves torch's own in force."""
    chosen = folder()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(chosen, os.W_OK):
        os.environ[TORCHS] = str(chosen)
