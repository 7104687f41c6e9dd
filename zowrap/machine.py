"""What the machine has: free memory, and random generators that are to stand where they stood."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What is left to others: allocators keep freed pages, and the prediction counts live bytes alone.
MARGIN = 0.1

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2⁶³ where nothing limits


def free_memory(device: torch.device | None = None) -> int:
    """Bytes free on ``device``, by default where a model would live: the current GPU, else main memory.

    Of a GPU, blocks that the caching allocator holds and does not use are free, but for those in the pools of CUDA
    graphs, which only their replays use; of main memory there is less where a cgroup limits the process.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused - _unused_in_pools(device)
    import psutil  # a requirement of accelerate

    return max(0, min([psutil.virtual_memory().available, *_left_in_cgroups()]))


def _unused_in_pools(device: torch.device) -> int:
    """Bytes of a GPU that private pools of the caching allocator hold and do not use."""
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync has no such pools, and no snapshot
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _left_in_cgroups(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What every limit on this process leaves: of its cgroup and of those above it, versions 1 and 2."""
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
    """The number in a file; None where there is none (``max``), or no file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path) -> int:
    """Bytes of cached files in a cgroup's usage: they are dropped when memory is asked for."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def fits(needed: int, free: int) -> bool:
    """Whether ``needed`` bytes fit into ``free`` ones with :data:`MARGIN` to spare."""
    return needed <= free * (1 - MARGIN)


def in_words(count: float) -> str:
    """Bytes for people: ``1.2 GB``; decimal, as memory is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


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


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the global generators stand where they stood, that of a GPU among them."""
    kept = random.getstate(), np.random.get_state(), states(device)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        restore(device, kept[2])
