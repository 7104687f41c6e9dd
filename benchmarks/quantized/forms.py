"""List the forms that are compared: how the weights are held, and how they move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

INT8: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class Form:
    """A row of the table.

    Attributes:
        rates: the grid of learning rates on TREC.
        lm_rates: the grid in language modelling.
        queries: directions per step; the number of steps is divided by it.
        wrap: further options of ``zo_wrap``.
    """

    rates: tuple[float, ...]
    lm_rates: tuple[float, ...]
    eps: float
    quantization: dict[str, Any] | None = None
    quantized: str | None = None
    dtype: torch.dtype = torch.float32
    queries: int = 1
    wrap: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "fp32": Form((4e-4, 1e-3), (1e-3, 3e-3), 1e-3),
    "bf16": Form((4e-4, 1e-3), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16),
    "bf16, evaluated": Form((4e-4,), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16, wrap={"along": "evaluated"}),
    "bf16, masters": Form((4e-4,), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16, wrap={"masters": True}),
    "bf16, ε 0.001": Form((4e-4,), (1e-3, 3e-3), 1e-3, dtype=torch.bfloat16),
    "bf16, ε 0.001, evaluated": Form((4e-4,), (1e-3, 3e-3), 1e-3, dtype=torch.bfloat16, wrap={"along": "evaluated"}),
    "int8 scales": Form((8e-3, 4e-3), (1e-2, 3e-3), 1e-1, INT8, "scales"),
    "int8 scales, ε 0.01": Form((8e-3,), (1e-2, 3e-3), 1e-2, INT8, "scales"),
    "int8 adapters": Form((1.5e-3, 3e-3), (1e-2, 3e-3), 3e-2, INT8, "adapters"),
    "int8 codes": Form((4e-4,), (1e-3, 3e-3), 3e-3, INT8, "codes"),
    "int8 codes, 64 queries": Form((3e-3, 1e-3), (1e-2, 3e-3), 3e-3, INT8, "codes", queries=64),
    "nf4 adapters": Form((1.5e-3, 3e-3), (1e-2, 3e-3), 3e-2, NF4, "adapters"),
}
FORWARDS = {"classification": 2400, "lm": 600}
SEEDS = (0, 1, 2)
