"""Predict how long a step takes to compile, from measurements."""

from __future__ import annotations

from zowrap.step.blocks import layer_names
from zowrap.step.job import Job

# One program with its kernels; of a model without repeated layers there is one region to compile instead of three.
COMPILE_SECONDS, COMPILE_PLAIN_SECONDS = 35.0, 20.0
PROGRAM_SECONDS = 4.0  # each further program (of another block): the 6 blocks of the first model took 57 s in all


def compile_seconds(job: Job) -> float:
    """Seconds that compiling the programs of a step takes with an empty cache."""
    first = COMPILE_SECONDS if len(layer_names(name for name, _ in job.loss.model.named_modules())) > 2 else None
    return (COMPILE_PLAIN_SECONDS if first is None else first) + PROGRAM_SECONDS * (len(job.blocks) - 1)
