"""List the measured cases: models, batches and rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

ZEROTH = ("classic MeZO", "gaussian", "gaussian, sequential", "rademacher", "lowrank(1)", "meazo", "zo_adam")
FIRST = ("AdamW, all weights", "AdamW, LoRA r8")


@dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
        int8: weights held by bitsandbytes in 8 bit.
        rows: in addition to the two plain forwards.
    """

    name: str
    arch: str
    rows_of_batch: int
    length: int
    rows: tuple[str, ...]
    dtype: str = "bfloat16"
    int8: bool = False

    def tiny(self) -> Case:
        """The same rows on a model that anything can run."""
        return replace(self, arch="opt-tiny", rows_of_batch=min(self.rows_of_batch, 2), length=8, dtype="float32")


CASES = (
    Case("OPT-1.3B, 16 × 256", "opt-1.3b", 16, 256, (*ZEROTH, "population, lowrank(1)", "LoRA r8", *FIRST)),
    Case("OPT-1.3B, 1 × 64", "opt-1.3b", 1, 64, ("classic MeZO", "gaussian", "rademacher", "lowrank(1)")),
    Case(
        "OPT-13B, 16 × 256",
        "opt-13b",
        16,
        256,
        ("classic MeZO", "gaussian", "gaussian, sequential", "one layer per step", *FIRST),
    ),
    Case("OPT-13B int8, 8 × 256", "opt-13b", 8, 256, ("scales", "adapters", "AdamW, LoRA r8"), int8=True),
    Case("OPT-13B int8, 1 × 64", "opt-13b", 1, 64, ("scales", "adapters"), int8=True),
)
