"""Quantised models: lowering to plain modules, and the ways their weights move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zowrap.quant.convert import load_options
from zowrap.quant.lowering import SUPPORTED, accepted_by_the_trainer, is_quantized, lower, lowered, raise_back, raised

if TYPE_CHECKING:
    from zowrap.quant.floor import noise_floor

__all__ = [
    "SUPPORTED",
    "accepted_by_the_trainer",
    "is_quantized",
    "load_options",
    "lower",
    "lowered",
    "noise_floor",
    "quantization",
    "raise_back",
    "raised",
]


def __getattr__(name: str) -> Any:
    if name == "noise_floor":  # it needs the engines, which need this package
        from zowrap.quant.floor import noise_floor

        return noise_floor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quantization(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """``load_in_8bit`` or ``load_in_4bit`` of a command as arguments of ``BitsAndBytesConfig``; None for neither.

    Threshold 0 rounds all activations: the outlier path is slower and its set of columns differs between the two
    sides of a direction. 4-bit weights are nf4, quantised twice, as QLoRA (2305.14314) recommends.
    """
    if options.get("load_in_8bit"):
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if options.get("load_in_4bit"):
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return None
