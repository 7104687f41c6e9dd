"""Rules of installed packages: the entry points of the group ``zowrap.rules``.

The module that an entry point names calls :func:`zowrap.rules.register` when imported.
"""

from __future__ import annotations

import importlib.metadata

from zowrap.names import RULES_OF_PACKAGES as GROUP

_installed_loaded = False


def load_installed() -> list[str]:
    """Import what installed packages name in the group ``zowrap.rules``; once.

    Returns:
        A sentence for each that failed; its rules are left out.
    """
    global _installed_loaded
    if _installed_loaded:
        return []
    _installed_loaded = True
    failed = []
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else point.name
            failed.append(f"the rules of {package} ({point.value}) are left out: {type(error).__name__}: {error}")
    return failed
