"""Digests of what a run computed, the file that keeps them, and how two are compared.

Bits follow from the processor and the compiler, too. What was written in another environment is therefore compared in
part: exactly where a run consists of operations that every processor rounds alike (``portable``), else in a few numbers
(``near``) within tolerances.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("digests.json")
# How far the numbers of ``near`` may lie apart, relatively: about thirty times what they do between the instructions of
# one processor. "first" is the mean loss of the first step, the others are ends of runs.
TOLERANCES = {"first": 1e-4, "last": 2e-4, "moved": 1e-3}
LOOSE = {"first": 2e-3, "last": 5e-2, "moved": 1e-1}
# The instructions that kernels are chosen by.
_INSTRUCTIONS = (
    *("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),
)


@dataclass
class Outcome:
    """What a run computed.

    Attributes:
        parts: by name, tensors by name or what JSON holds; each gets a digest of its own.
        near: a few numbers to compare within tolerances; each is named by what comes before its first colon.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    near: dict[str, float] = field(default_factory=dict)

    def digests(self) -> dict[str, Any]:
        """The entry of ``digests.json``."""
        near = {name: float(f"{value:.8g}") for name, value in self.near.items()}
        return {"digests": {name: digest(part) for name, part in self.parts.items()}, "near": near}


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that change with every bit, name, shape and dtype of what is given."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()[:16]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            found.update(f"{name!r}:".encode())
            _add(found, value[name])
        found.update(b"}")
    elif isinstance(value, list | tuple):
        for each in value:
            _add(found, each)
            found.update(b",")
        found.update(b"]")
    else:
        found.update(json.dumps(value).encode())  # numbers by their shortest text, which names one number


# --- the environment ------------------------------------------------------------------------------------------------


@cache
def environment() -> dict[str, Any]:
    """What the bits of a run depend on beside the run."""
    told = {}
    if Path("/proc/cpuinfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        told = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(told.get("flags", told.get("Features", "")).split())
    return {
        "machine": platform.machine(),
        "vendor": told.get("vendor_id", ""),
        "instructions": " ".join(name for name in _INSTRUCTIONS if name in flags),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "compiler": _compiler(),
        **{name: _version(name) for name in ("torch", "transformers", "bitsandbytes", "torchao")},
    }


def _compiler() -> str:
    program = shutil.which("g++")
    if program is None:
        return ""
    told = subprocess.run([program, "-dumpfullversion"], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment_differences(kept: dict[str, Any]) -> list[str]:
    """What of the environment is not as it was where the digests were written."""
    here = environment()
    return [f"{name} {kept.get(name)!r}, here {here[name]!r}" for name in here if kept.get(name) != here[name]]


# --- the file -------------------------------------------------------------------------------------------------------


def read_digests() -> dict[str, Any]:
    """``{"environment": …, "runs": {name: {"digests": …, "near": …}}}``."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"environment": {}, "runs": {}}


def write_digests(runs: dict[str, Any]) -> None:
    """Renew the file, with the environment of this process."""
    content = {"environment": environment(), "runs": runs}
    FILE.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(kept: dict[str, Any] | None, found: dict[str, Any], exact: bool, loose: bool = False) -> list[str]:
    """What differs, a phrase for each.

    Args:
        kept: the entry of the file; None where there is none.
        found: the entry as this run has it.
        exact: compare every digest, else the tolerant numbers alone.
        loose: take the wider tolerances.
    """
    tolerances = LOOSE if loose else TOLERANCES
    if kept is None:
        return ["it has no digests yet"]
    differences = []
    for kind in ("digests", "near") if exact else ("near",):
        for name in sorted(kept[kind].keys() | found[kind].keys()):
            old, new = kept[kind].get(name), found[kind].get(name)
            if old is None or new is None:
                differences.append(f"{name} is {'new' if old is None else 'gone'}")
            elif kind == "digests" and old != new:
                differences.append(name)
            elif kind == "near" and not abs(new - old) <= tolerances[name.partition(":")[0]] * abs(old):
                differences.append(f"{name} ({old:.6g} before, {new:.6g} now)")
    return differences
