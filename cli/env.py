"""``zowrap env``: versions, devices, and what works on this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from typing import Any

import typer

from zowrap.cli.console import quiet_libraries, result
from zowrap.cli.options import Json, takes

_PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "peft", "datasets", "pyarrow", "matplotlib",
)  # fmt: skip


@dataclasses.dataclass
class EnvOptions:
    json: Json = False


@takes(EnvOptions)
def env(context: typer.Context, options: EnvOptions) -> None:
    """Say what this machine has and which parts of zowrap work on it."""
    quiet_libraries()
    import torch

    from zowrap.compiler import cache
    from zowrap.version import __version__

    versions = {name: _version(name) for name in _PACKAGES}
    devices = _devices(torch)
    compiler = _compiler()
    works = {
        "compiled engine": "yes" if compiler else "no: no C++ compiler found; the eager engine is used (CXX names one)",
        "adapters (PEFT)": _needs(versions, "peft"),
        "Parquet": _needs(versions, "pyarrow"),
        "data sets of the hub": _needs(versions, "datasets"),
        "pictures (loss.png)": _needs(versions, "matplotlib"),
    }
    record = {
        "zowrap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "compiler": compiler,
        "cache": str(cache.cache_folder()),
        "works": works,
    }
    lines = [f"zowrap {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name:14} {version or 'not installed'}" for name, version in versions.items()]
    lines += [f"device         {device}" for device in devices]
    lines += [f"compiler       {compiler or 'none'}", f"cache          {cache.cache_folder()} (compiled code)"]
    lines += ["", *(f"{name:22} {answer}" for name, answer in works.items())]
    result(record, options.json, lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needs(versions: dict[str, str | None], package: str) -> str:
    return "yes" if versions[package] else f"no: pip install {package}"


def _devices(torch: Any) -> list[str]:
    found = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return found


def _compiler() -> str | None:
    """Path of the C++ compiler that torch would use: ``CXX``, else g++, clang++ or c++."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named.split()[0])
    return next((path for path in map(shutil.which, ("g++", "clang++", "c++")) if path), None)
