"""Load and launch generated Triton, which reads a kernel's source from its module: here one that is only in memory."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import linecache
from types import CodeType
from typing import Any

import torch

from zowrap.errors import ZOCaptureError, first_line

_HEAD = """import triton
import triton.language as tl


"""


class _InMemory(importlib.abc.InspectLoader):
    """Loads a module from its text; tracebacks and Triton find its lines under a unique file name."""

    def __init__(self, name: str, text: str) -> None:
        self.text, self.path = text, f"<{name}>"
        # Without a modification time, linecache keeps the entry although no such file exists.
        linecache.cache[self.path] = (len(text), None, text.splitlines(keepends=True), self.path)

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text, self.path)


def kernel(source: str) -> Any:
    """Return the function ``kernel`` that the source defines; Triton compiles it when it is first launched.

    Triton caches machine code by source text, so another process with the same kernel does not compile it again.

    Raises:
        ZOCaptureError: Triton is not installed.
    """
    text = _HEAD + source
    name = f"zowrap_{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
    spec = importlib.util.spec_from_loader(name, _InMemory(name, text))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ZOCaptureError(f"kernels on a GPU need Triton (pip install triton): {error}") from error
    return module.kernel


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """Run a kernel, and compile it first if necessary.

    Raises:
        ZOCaptureError: Triton, an assembler or compiler that it calls, or the driver rejects the kernel.
    """
    try:
        kernel[grid](*given, **options)
    except Exception as error:  # these errors have no common type
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise  # the kernel ran before, so it is the CUDA graph that cannot be recorded
        first = first_line(error, "no reason given")
        raise ZOCaptureError(f"Triton refused a kernel ({type(error).__name__}: {first[:200]})") from error
