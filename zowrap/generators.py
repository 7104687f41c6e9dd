"""torch's global generators that a model may draw from: the CPU's, and that of the GPU it lies on."""

from __future__ import annotations

import torch
from torch import Tensor

States = tuple[Tensor, ...]


def states(device: torch.device) -> States:
    """Where the generators for a model on ``device`` stand, for :func:`restore`."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def restore(device: torch.device, kept: States) -> None:
    """Put them where they stood when :func:`states` was asked for the same ``device``."""
    torch.set_rng_state(kept[0])
    if len(kept) > 1:
        torch.cuda.set_rng_state(kept[1], device)
