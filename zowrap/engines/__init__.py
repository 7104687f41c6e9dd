"""The two engines: compiled (the product) and eager (the oracle)."""

from __future__ import annotations

from zowrap.engines.eager import EagerEngine
from zowrap.names import ENGINES
from zowrap.step.job import DirectionNoise, Engine, Job

__all__ = ["ENGINES", "DirectionNoise", "Engine", "Job", "build_engine"]


def build_engine(name: str | None, job: Job, points: int) -> Engine:
    """The engine of that name; ``None`` is the compiled one with the eager one behind it."""
    if name == "eager":
        return EagerEngine(job)
    from zowrap.engines.compiled import CompiledEngine  # the passes and Inductor are imported only where used

    return CompiledEngine(job, points, fall_back=name is None)
