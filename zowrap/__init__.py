"""zowrap: fine-tune any torch model with forward passes alone.

import zowrap
zm = zowrap.zo_wrap(model, rule="meazo")
for batch in batches:
    result = zm.step(**batch)
zm.save_pretrained("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zowrap import rules
    from zowrap.errors import ZOError, ZOInternalError
    from zowrap.lr import LearningRate, tune_lr
    from zowrap.model import StepResult, ZOModel
    from zowrap.trainer import ZOConfig, ZOTrainer
    from zowrap.wrap import zo_wrap

# Names are imported on first use, so that `zowrap --help` does not pay for torch.
_HOME = {
    "zo_wrap": "zowrap.wrap",
    "tune_lr": "zowrap.lr",
    "LearningRate": "zowrap.lr",
    "ZOModel": "zowrap.model",
    "StepResult": "zowrap.model",
    "ZOConfig": "zowrap.trainer",
    "ZOTrainer": "zowrap.trainer",
    "ZOError": "zowrap.errors",
    "ZOInternalError": "zowrap.errors",
}

__all__ = [
    "LearningRate",
    "StepResult",
    "ZOConfig",
    "ZOError",
    "ZOInternalError",
    "ZOModel",
    "ZOTrainer",
    "__version__",
    "rules",
    "tune_lr",
    "zo_wrap",
]


def __getattr__(name: str) -> Any:
    if name == "rules":
        return importlib.import_module("zowrap.rules")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zowrap' has no attribute {name!r}")
