"""Measure the machine's free memory, and save and restore its random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# The share of free memory to leave unused: allocators keep freed pages, and predictions count live bytes only.
MARGIN = 0.1

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2⁶³ for "no limit"


def free_memory(device: torch.device | None = None) -> int:
    """Bytes free on ``device``, by default on the current GPU, or in main memory if there is none.

    On a GPU, blocks that the caching allocator holds without using them count as free, except those in the pools of
    CUDA graphs, which only their replays can use. In main memory the limits of the process's cgroups apply.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused - _unused_in_pools(device)
    import psutil  # a requirement of accelerate

    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups()]))


def _unused_in_pools(device: torch.device) -> int:
    """Bytes on a GPU that private pools of the caching allocator hold without using them."""
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync has no such pools, and no snapshot
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _left_in_cgroups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each memory limit of this process leaves: its cgroup's and its ancestors', versions 1 and 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - used + _reclaimable(folder)
            if folder == top:
                break


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_V2 = ("memory.max", "memory.current")


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no file or no number in it (``max``)."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path) -> int:
    """Bytes of cached files in a cgroup's usage, which the kernel drops when memory runs short."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def fits(needed: int, free: int) -> bool:
    """Whether ``needed`` bytes fit into ``free`` bytes with :data:`MARGIN` to spare."""
    return needed <= free * (1 - MARGIN)


def format_bytes(count: float) -> str:
    """A number of bytes for people, in decimal units: ``1.2 GB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


States = tuple[Tensor, ...]


def rng_states(device: torch.device) -> States:
    """The states of torch's generators for a model on ``device``, to hand to :func:`restore_rng`."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def restore_rng(device: torch.device, saved: States) -> None:
    """Set torch's generators to what :func:`rng_states` returned for the same ``device``."""
    torch.set_rng_state(saved[0])
    if len(saved) > 1:
        torch.cuda.set_rng_state(saved[1], device)


@contextmanager
def preserve_rng(device: torch.device) -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (the GPU's included) on leaving."""
    saved = random.getstate(), np.random.get_state(), rng_states(device)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        restore_rng(device, saved[2])
