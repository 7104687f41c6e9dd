"""The environment of a run: whatever the last bits of a sum depend on besides the run's options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from zowrap.training.messages import say

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel


def describe_environment(zm: ZOModel) -> dict[str, Any]:
    """Return torch's version, the device and the number of threads; after the first step also engine and schedule.

    Before the first step nothing is compiled: a run that was to be compiled may still turn out to be eager.
    """
    device = zm.parameters[0].tensor.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = {"torch": torch.__version__, "device": kind, "threads": torch.get_num_threads()}
    if zm.step_count:
        facts |= {"engine": zm.engine.describe()["engine"], "memory": zm.schedule.name}
    return facts


def say_differences(began_with: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> None:
    """Say which of these facts have changed since the run began: the last bits of later steps may then differ."""
    for name in names:
        if began_with.get(name, now[name]) != now[name]:
            say(
                f"the run began with {name} {began_with[name]}, now it is {now[name]}: "
                "later steps may differ in last bits"
            )
