"""Whether a saved state fits the model it is to be loaded into: asked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zowrap.errors import ZOError
from zowrap.names import MEMORY

# What a run is: a state that differs in one of these is another run's.
_SAME = ("rule", "direction", "estimator", "queries", "blocks", "block_order", "along")
# States of earlier versions lack these, and were made under these values.
LATER = {"memory": "auto", "largest_batch": 0, "along": "drawn"}


def check_state(state: Any, mine: Mapping[str, Any]) -> None:
    """Raise :class:`ZOError`, naming the first difference, unless ``state`` can take the place of ``mine``.

    Args:
        state: what is to be loaded, see :meth:`zowrap.ZOModel.state_dict`.
        mine: the present state of the model.
    """
    if not isinstance(state, Mapping):
        raise ZOError(f"a state is the dictionary that state_dict() returned, not {type(state).__name__}")
    for name, value in mine.items():
        if not isinstance(value, Tensor):
            _check_fact(state, name, value)
    for name in _SAME:
        theirs = state.get(name, LATER.get(name))
        if theirs != mine[name]:
            raise ZOError(f"this state was saved with {name}={theirs!r}, the model is wrapped with {mine[name]!r}")
    if state["parameters"] != mine["parameters"]:
        raise ZOError("this state is of another model: its tunable parameters have other names or shapes")
    for name, value in mine.items():
        if isinstance(value, Tensor):
            _check_tensor(state, name, value)
    extra = [name for name, value in state.items() if isinstance(value, Tensor) and name not in mine]
    if extra:
        raise ZOError(f"this state is of another model: it also holds {extra[0]}")


def _check_fact(state: Mapping[str, Any], name: str, mine: Any) -> None:
    if name not in state:
        if name in LATER:
            return
        raise ZOError(f"this is not the state of such a model: {name} is missing")
    value = state[name]
    kinds = (int, float) if type(mine) is float else (type(mine),)
    if type(value) not in kinds:
        raise ZOError(f"this state is damaged: its {name} is of type {type(value).__name__}")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ZOError(f"this state is damaged: its {name} is {value}")
    negative = name in ("step", "lr", "weight_decay", "largest_batch") and value < 0
    if negative or (name == "memory" and value not in MEMORY):
        raise ZOError(f"this state is damaged: its {name} is {value}")


def _check_tensor(state: Mapping[str, Any], name: str, mine: Tensor) -> None:
    if name not in state:
        raise ZOError(f"this is not the state of such a model: {name} is missing")
    value = state[name]
    if not isinstance(value, Tensor) or value.shape != mine.shape:
        raise ZOError(f"this state is of another model: {name} has another shape")
    if value.dtype != mine.dtype:
        raise ZOError(f"this state is damaged: {name} is {value.dtype}, not {mine.dtype}")
    if not bool(value.isfinite().all()):
        raise ZOError(f"this state is damaged: {name} holds values that are not finite")
