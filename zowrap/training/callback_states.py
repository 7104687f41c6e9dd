"""The states of the callbacks that have one, such as the patience of early stopping: written, and given back.

A state is what ``ExportableState.state()`` returns, ``{"args": {…}, "attributes": {…}}``. Several callbacks of one
class each have their own, in the order in which they were added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl

from zowrap.storage.atomic import to_jsonable

# Class name → the state of its callback, or the states of its callbacks, as the Trainer's own file has them.
States = dict[str, Any]


def collect_states(callbacks: Iterable[TrainerCallback | TrainerControl]) -> States:
    """Return the states of all callbacks that have one, ready for JSON."""
    found: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(to_jsonable(callback.state()))
    return {name: each[0] if len(each) == 1 else each for name, each in found.items()}


def restore_states(callbacks: Iterable[TrainerCallback], states: States, arguments: bool) -> list[str]:
    """Give callbacks the states that they had when a run stopped.

    Only what a callback itself names as its state is set, whatever else the file holds.

    Args:
        callbacks: of the trainer; those without a state are left alone.
        states: as :func:`collect_states` returned them.
        arguments: also restore what a callback was made with. Without, a callback keeps what it was given now (another
            patience), and goes on counting where it was.

    Returns:
        The names of the classes of which there is no callback now, or fewer than there were.
    """
    waiting = {name: list(data) if isinstance(data, list) else [data] for name, data in states.items()}
    for callback in callbacks:
        queue = waiting.get(type(callback).__name__)
        if not queue or not isinstance(callback, ExportableState):
            continue
        saved, own = queue.pop(0), callback.state()
        parts = ("args", "attributes") if arguments else ("attributes",)
        if not isinstance(saved, dict) or any(not isinstance(saved.get(part, {}), dict) for part in parts):
            continue
        if arguments and saved.get("args") and saved["args"].keys() <= own.get("args", {}).keys():
            callback.__init__(**saved["args"])  # type: ignore[misc]
        for name, value in saved.get("attributes", {}).items():
            if name in own.get("attributes", {}):
                setattr(callback, name, value)
    return [name for name, left in waiting.items() if left and name != TrainerControl.__name__]
