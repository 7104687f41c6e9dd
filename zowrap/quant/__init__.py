"""Quantised models: lowering to plain modules, and the ways their weights move.

``layers``    lowered layers
``lowering``  the library's layers ⇄ lowered ones
``schemes``   which schemes are supported, and what each needs
``empty``     a quantised model without its weights
``adapters``  LoRA on a quantised base
``merge``     adapters merged into their base
``modes``     scales, codes or adapters: what moves
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zowrap.quant.lowering import lower, raise_back

if TYPE_CHECKING:
    from zowrap.calibration.noise_floor import noise_floor
    from zowrap.storage.base_options import load_options

__all__ = ["load_options", "lower", "noise_floor", "raise_back"]

# Documented under this name, and at home in rooms that need this one.
_ABOVE = {"load_options": "zowrap.storage.base_options", "noise_floor": "zowrap.calibration.noise_floor"}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(importlib.import_module(_ABOVE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
