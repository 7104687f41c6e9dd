"""Fixtures that make Triton's interpreter treat bfloat16 as hardware does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the interpreter, which truncates where a GPU rounds and multiplies matrices of raw bit patterns."""
    pytest.importorskip("triton", reason="the kernels for a GPU are written in Triton")
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16")
        return cut(values, source, target, mode)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(cut(handle.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(builder, wide(a), wide(b), *rest)

    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def loops_run() -> None:
    """Skip if the interpreter cannot run loops: Triton 3.6 makes numbers of one-element arrays, NumPy 2.4 refuses."""
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    old = Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4")
    if old and not torch.cuda.is_available():
        pytest.skip("the interpreter of Triton 3.6 does not run kernels with loops under NumPy 2.4 (take numpy<2.4)")


@pytest.fixture
def device() -> torch.device:
    """Return the device on which kernels run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
