"""The cost model of a wrapped model's step."""

from __future__ import annotations

from typing import Any

from zowrap import ZOModel
from zowrap.analysis.costs import CostModel


def cost_model_of(zm: ZOModel, batch: dict[str, Any]) -> CostModel:
    """For batches of these sizes."""
    return CostModel(zm.job, zm.engine, zm.schedule, batch)
