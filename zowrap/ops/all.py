"""Register every operator of ``torch.ops.zowrap`` on import."""

from __future__ import annotations

from zowrap.compiler import experts, recurrent, scans
from zowrap.loss import captured, deferred
from zowrap.ops import codes, head, int8, lookups, perturb, update, vmap_forms

__all__ = [
    "captured",
    "codes",
    "deferred",
    "experts",
    "head",
    "int8",
    "lookups",
    "perturb",
    "recurrent",
    "scans",
    "update",
    "vmap_forms",
]
