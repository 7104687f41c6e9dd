"""Tune quantised models: lower their layers to plain modules, and choose what moves.

``layers``    defines the lowered layers
``lowering``  replaces the library's layers by lowered ones, and back
``schemes``   checks which quantisation schemes are supported
``empty``     builds a quantised model without weights
``adapters``  attaches LoRA to a quantised base
``merge``     merges adapters into their base
``modes``     chooses between scales, codes and adapters, and selects what moves
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zowrap.quant.lowering import lower, raise_back

if TYPE_CHECKING:
    from zowrap.calibration.noise_floor import noise_floor
    from zowrap.storage.base_options import load_options

__all__ = ["load_options", "lower", "noise_floor", "raise_back"]

# Public under zowrap.quant, but defined in rooms that import this one.
_ABOVE = {"load_options": "zowrap.storage.base_options", "noise_floor": "zowrap.calibration.noise_floor"}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(importlib.import_module(_ABOVE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
