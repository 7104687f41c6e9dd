"""Times and memory of contenders, measured so that they can be compared.

Times are taken in one process, round after round. Each contender's step stands between two of the yardstick's, and its
ratio is to their mean, so that a slow second of the machine slows both; reported is the median over the rounds. Peak
memory is the process's, in a process of its own per contender, above what it held before its first step.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zowrap.bench.contenders import YARDSTICK, Contender


def interleaved(contenders: Sequence[Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For each contender and round: seconds per step, and their ratio to the yardstick's beside it."""
    yardstick = next(c for c in contenders if c.name == YARDSTICK)
    others = [c for c in contenders if c is not yardstick]
    found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        before = _seconds(yardstick)
        for contender in others:
            own = _seconds(contender)
            after = _seconds(yardstick)
            found[contender.name].append((own, 2 * own / (before + after)))
            found[YARDSTICK].append((after, 1.0))
            before = after
    return found


def seconds(contender: Contender, rounds: int) -> list[float]:
    """Seconds per step, one round after another."""
    return [_seconds(contender) for _ in range(rounds)]


def _seconds(contender: Contender) -> float:
    """Of one step."""
    _synchronise()
    start = time.perf_counter()
    contender.step()
    _synchronise()
    return (time.perf_counter() - start) / contender.per_call


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def peak_bytes(contender: Contender, device: torch.device, steps: int = 3) -> int | None:
    """Most memory held at once during some steps, above what is held between them; None where that is not known.

    On Linux it is the resident set, with the allocator's free pages returned first; on CUDA the allocator's own peak.
    The replay of a CUDA graph allocates nothing there: a step of ours is not recorded meanwhile, and of a contender
    that replays graphs of its own nothing is known.

    Args:
        device: where the contender's model lies.
    """
    if contender.replays:
        return None
    zm = contender.wrapped
    if zm is None:
        return _peak_bytes(contender, device, steps)
    recorder, zm.graphs = zm.graphs, None
    try:
        return _peak_bytes(contender, device, steps)
    finally:
        zm.graphs = recorder


def _peak_bytes(contender: Contender, device: torch.device, steps: int) -> int | None:
    """Of steps that allocate what they need."""
    contender.step()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(steps):
            contender.step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")  # forgets the peak of the resident set
    except OSError:
        return None
    before = _resident("VmRSS")
    for _ in range(steps):
        contender.step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
