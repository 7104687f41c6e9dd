"""Load the rules of installed packages from the entry points of the group ``zowrap.rules``.

An entry point names a module that calls :func:`zowrap.rules.register` when it is imported.
"""

from __future__ import annotations

import importlib.metadata

from zowrap.names import RULES_OF_PACKAGES as GROUP

_installed_loaded = False


def load_installed() -> list[str]:
    """Import the modules that installed packages name in the group ``zowrap.rules``, once per process.

    Returns:
        One sentence for each that failed; its rules are not registered.
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
            failed.append(f"cannot load the rules of {package} ({point.value}): {type(error).__name__}: {error}")
    return failed
