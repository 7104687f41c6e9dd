"""Register every operator of ``torch.ops.zowrap`` on import."""

from __future__ import annotations

from zowrap.compiler import recurrent
from zowrap.loss import captured
from zowrap.ops import codes, head, int8, lookups, perturb, update, vmap_forms

__all__ = ["captured", "codes", "head", "int8", "lookups", "perturb", "recurrent", "update", "vmap_forms"]
