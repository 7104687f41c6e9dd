"""Options that name a file or a folder."""

from __future__ import annotations

import os
from typing import Any

# Marks an option that names a file or a folder: ``~`` in it is expanded once, before any command sees it.
PATH = object()


def expand(value: Any) -> Any:
    """``~/models`` → ``/home/me/models``, which no shell does in a quoted argument or a configuration file."""
    if isinstance(value, list):
        return [expand(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _is_path(annotation: Any) -> bool:
    return any(each is PATH for each in getattr(annotation, "__metadata__", ()))
