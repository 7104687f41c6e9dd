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

from zowrap.version import __version__ as __version__

if TYPE_CHECKING:
    from zowrap import rules as rules
    from zowrap.calibration.learning_rate import LearningRate as LearningRate
    from zowrap.calibration.learning_rate import tune_lr as tune_lr
    from zowrap.calibration.noise_floor import noise_floor as noise_floor
    from zowrap.errors import ZOCaptureError as ZOCaptureError
    from zowrap.errors import ZOError as ZOError
    from zowrap.errors import ZOInternalError as ZOInternalError
    from zowrap.errors import ZOWarning as ZOWarning
    from zowrap.model.zo_model import StepResult as StepResult
    from zowrap.model.zo_model import ZOModel as ZOModel
    from zowrap.storage.base_options import load_options as load_options
    from zowrap.training.config import ZOConfig as ZOConfig
    from zowrap.training.trainer import ZOTrainer as ZOTrainer
    from zowrap.wrap import zo_wrap as zo_wrap

# Where each public name lives. They are imported on first use, so that `zowrap --help` does not pay for torch.
_HOME = {
    "LearningRate": "zowrap.calibration.learning_rate",
    "StepResult": "zowrap.model.zo_model",
    "ZOCaptureError": "zowrap.errors",
    "ZOConfig": "zowrap.training.config",
    "ZOError": "zowrap.errors",
    "ZOInternalError": "zowrap.errors",
    "ZOModel": "zowrap.model.zo_model",
    "ZOTrainer": "zowrap.training.trainer",
    "ZOWarning": "zowrap.errors",
    "load_options": "zowrap.storage.base_options",
    "noise_floor": "zowrap.calibration.noise_floor",
    "tune_lr": "zowrap.calibration.learning_rate",
    "zo_wrap": "zowrap.wrap",
}
__all__ = sorted([*_HOME, "__version__", "rules"])


def __getattr__(name: str) -> Any:
    if name == "rules":
        return importlib.import_module("zowrap.rules")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'zowrap' has no attribute {name!r}")
