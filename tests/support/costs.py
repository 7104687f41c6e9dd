"""What works out the costs of a wrapped model's step."""

from __future__ import annotations

from typing import Any

from zowrap import ZOModel
from zowrap.analysis.costs import Estimator


def estimator_of(zm: ZOModel, batch: dict[str, Any]) -> Estimator:
    """For batches of these sizes."""
    return Estimator(zm.job, zm.engine, zm.schedule, batch)
