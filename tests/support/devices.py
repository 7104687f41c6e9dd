"""What stands in for a GPU where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


class GpuGenerator:
    """The generator of a GPU: where it stands, and which devices it was asked of."""

    def __init__(self) -> None:
        self.position = 0
        self.devices: set[torch.device] = set()

    def get(self, device: torch.device) -> Tensor:
        self.devices.add(device)
        return torch.tensor(self.position)

    def set(self, state: Tensor, device: torch.device) -> None:
        self.devices.add(device)
        self.position = int(state)


def gpu_generator(monkeypatch: pytest.MonkeyPatch) -> GpuGenerator:
    """In the place of torch's own, for the rest of a test."""
    made = GpuGenerator()
    monkeypatch.setattr(torch.cuda, "get_rng_state", made.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", made.set)
    return made
