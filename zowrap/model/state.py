"""The state of a wrapped model: collected, checked against the model that is to take it over, and applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zowrap.errors import ZOError
from zowrap.model.wrapped import Wrapped
from zowrap.names import MEMORY
from zowrap.step.options import IDENTITY
from zowrap.step.parameters import hash_shapes

# A state brings its own seed, and goes on from there.
_SAME = tuple(name for name in IDENTITY if name != "seed")
_ADDED = {"check_every": None}  # options that states of earlier versions lack: they had no such thing
_PLAIN = (str, int, list, type(None))
_NEVER_NEGATIVE = ("step", "lr", "weight_decay", "largest_batch", "descent/factor", "descent/failed")


def collect_state(zm: Wrapped) -> dict[str, Any]:
    """The state as :meth:`zowrap.ZOModel.state_dict` returns it."""
    job = zm.job
    state: dict[str, Any] = {
        **{name: getattr(zm.options, name) for name in IDENTITY},
        "rule": job.rule.describe(),
        "direction": job.direction.name,
        "blocks": [block.name for block in job.blocks],
        "seed": zm.seed,
        "step": zm.step_count,
        "parameters": hash_shapes(job.parameters),
        "loss": job.loss.form,
        **zm.schedule.record(),
        **zm.hyper,
    }
    for block, scalars in zip(job.blocks, job.states, strict=True):
        state.update({f"scalars/{block.name}/{name}": value.clone() for name, value in scalars.items()})
    if job.estimator.credit:
        state.update({"descent/factor": zm.descent.factor, "descent/failed": zm.descent.failed})
    for slot, parameter, tensor in job.kept():
        state[f"slots/{slot}/{parameter.name}"] = tensor.clone()
    return state


def apply_state(zm: Wrapped, state: Mapping[str, Any]) -> None:
    """Go on from a state that :func:`check_state` has passed."""
    job = zm.job
    zm.schedule.take(state["memory"], state["largest_batch"])
    zm.set_hyper(**{name: float(state[name]) for name in zm.hyper})
    job.loss.settle_as(state["loss"])
    for block, scalars in zip(job.blocks, job.states, strict=True):
        for name, value in scalars.items():
            value.copy_(state[f"scalars/{block.name}/{name}"])
    for slot, parameter, tensor in job.kept():
        tensor.copy_(state[f"slots/{slot}/{parameter.name}"])
    if job.estimator.credit:
        zm.descent.factor, zm.descent.failed = float(state["descent/factor"]), state["descent/failed"]
    zm.step_count, zm.seed = state["step"], state["seed"]


def check_state(state: Any, mine: Mapping[str, Any]) -> None:
    """Raise :class:`ZOError`, naming the first difference, unless ``state`` can take the place of ``mine``.

    Args:
        state: to be loaded, see :meth:`zowrap.ZOModel.state_dict`.
        mine: the present state of the model.
    """
    if not isinstance(state, Mapping):
        raise ZOError(f"a state is the dictionary that state_dict() returned, not {type(state).__name__}")
    state = {**_ADDED, **state}
    missing = [name for name, value in mine.items() if name not in state and not isinstance(value, Tensor)]
    if missing:
        raise ZOError(f"this is not the state of such a model: {missing[0]} is missing")
    for name, value in mine.items():
        if not isinstance(value, Tensor) and name not in _SAME:
            _check_fact(state, name, value)
    for name in _SAME:
        if not isinstance(state[name], _PLAIN):
            raise ZOError(f"this state is damaged: its {name} is of type {type(state[name]).__name__}")
        if state[name] != mine[name]:
            raise ZOError(f"this state was saved with {name}={state[name]!r}, the model is wrapped with {mine[name]!r}")
    if state["parameters"] != mine["parameters"]:
        raise ZOError("this state is of another model: its tunable parameters have other names or shapes")
    for name, value in mine.items():
        if isinstance(value, Tensor):
            _check_tensor(state, name, value)
    extra = [name for name, value in state.items() if isinstance(value, Tensor) and name not in mine]
    if extra:
        raise ZOError(f"this state is of another model: it also holds {extra[0]}")


def _check_fact(state: Mapping[str, Any], name: str, mine: Any) -> None:
    value = state[name]
    kinds = (int, float) if type(mine) is float else (type(mine),)
    if type(value) not in kinds:
        raise ZOError(f"this state is damaged: its {name} is of type {type(value).__name__}")
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ZOError(f"this state is damaged: its {name} is {value}")
    negative = name in _NEVER_NEGATIVE and value < 0
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
