"""The version of this package, alone, so that every room can name it."""

from __future__ import annotations

__version__ = "0.1.0"
