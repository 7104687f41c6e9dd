"""Does it fit? Free memory, the schedule that fits it, and what would help where none does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zowrap.costs import Costs

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


def choose_memory(paired: int, sequential: int, free: int) -> tuple[str, str]:
    """The schedule for ``memory="auto"``, and why, in words.

    Args:
        paired, sequential: predicted peak bytes under each, see :attr:`zowrap.costs.Costs.schedules`.
        free: bytes free, see :func:`free_memory`; where the model is loaded already, its weights and state added back.

    Returns:
        ``"paired"``, the faster one, unless only ``"sequential"`` fits.
    """
    if fits(paired, free):
        return "paired", "it is faster, and fits"
    if sequential >= paired:
        return "paired", f"sequential would need no less than its {in_words(paired)}"
    needs = f"paired needs {in_words(paired)} and {in_words(free)} are free, sequential needs {in_words(sequential)}"
    if fits(sequential, free):
        return "sequential", needs
    return "sequential", f"{needs}: neither fits, it comes closest"


def what_helps(costs: Costs | None, batch_size: int, itemsize: int) -> list[str]:
    """Options of the command line under which less memory is needed, where each would save a tenth or more.

    Args:
        costs: under the schedule in use; None where they are not known.
        itemsize: bytes of a weight.
    """
    found = []
    if costs is not None:
        memory = costs.memory
        if costs.schedules["sequential"] < memory.peak * (1 - MARGIN):
            found.append("--memory sequential")
        if batch_size > 1 and memory.transient > MARGIN * memory.peak:
            found.append("a smaller --batch-size")
        if memory.state > MARGIN * memory.peak:
            found.append("a rule without state (zo_sgd), or fewer weights that move (--trainable, adapters)")
    if itemsize > 2:
        found.append("--dtype bfloat16")
    return found or ["a smaller model"]


def in_words(count: float) -> str:
    """Bytes for people: ``1.2 GB``; decimal, as memory is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
