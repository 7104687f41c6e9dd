"""Measure the times and peak memory of contenders so that they can be compared.

Times are taken in one process, round after round. Each contender's step is between two of the yardstick's, and its
ratio is to their mean, so that a slow moment of the machine affects both; the report is the median over rounds. Peak
memory is measured in a separate process per contender, above what it held before its first step.
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


def time_interleaved(contenders: Sequence[Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Time all contenders in turn: for each one and round, seconds per step and their ratio to the yardstick's."""
    yardstick = next(c for c in contenders if c.name == YARDSTICK)
    others = [c for c in contenders if c is not yardstick]
    found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        before = _time_step(yardstick)
        for contender in others:
            own = _time_step(contender)
            after = _time_step(yardstick)
            found[contender.name].append((own, 2 * own / (before + after)))
            found[YARDSTICK].append((after, 1.0))
            before = after
    return found


def time_steps(contender: Contender, rounds: int) -> list[float]:
    """Measure the seconds per step in each round."""
    return [_time_step(contender) for _ in range(rounds)]


def _time_step(contender: Contender) -> float:
    """Measure the seconds of one step."""
    _synchronise()
    start = time.perf_counter()
    contender.step()
    _synchronise()
    return (time.perf_counter() - start) / contender.per_call


def summarise_spread(values: Sequence[float]) -> dict[str, float]:
    """The median and quartiles of ``values``."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def measure_peak_bytes(contender: Contender, device: torch.device, steps: int = 3) -> int | None:
    """Measure the peak memory of a step above what is held between steps; None if it cannot be measured.

    On Linux this is the resident set, after returning the allocator's free pages; on CUDA the allocator's own peak.
    Replaying a CUDA graph allocates nothing there, so our own steps run without graphs meanwhile, and a contender that
    replays graphs of torch.compile cannot be measured.

    Args:
        device: of the contender's model.
    """
    if contender.replays:
        return None
    zm = contender.wrapped
    if zm is None:
        return _measure_peak_bytes(contender, device, steps)
    recorder, zm.graphs = zm.graphs, None
    try:
        return _measure_peak_bytes(contender, device, steps)
    finally:
        zm.graphs = recorder


def _measure_peak_bytes(contender: Contender, device: torch.device, steps: int) -> int | None:
    """Measure the peak memory of steps without CUDA graphs."""
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
        reset.write_text("5")  # resets the peak of the resident set
    except OSError:
        return None
    before = _read_status("VmRSS")
    for _ in range(steps):
        contender.step()
    return _read_status("VmHWM") - before


def _read_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def describe_machine() -> dict[str, Any]:
    """Describe the machine that the measurements ran on."""
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
