"""The compiled engine without a compiler: programs run node by node, kernels as the functions they are traced from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from zowrap.compiler.inductor import Compiled
from zowrap.engines import compiled as compiled_engine
from zowrap.ops import head, kernels, loops, perturb_kernels


@dataclass
class Interpreted:
    """A program run node by node: its operations are seen by a trace, those of machine code would not be."""

    program: Any
    seconds: float = 0.0
    cached: bool = False
    compilations: int = 0

    def __call__(self, *inputs: Any, kept: Any = None) -> Any:
        return self.program(inputs)


def compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rest of a test."""

    def as_it_is(function: Callable[..., Any], *_: Any, **__: Any) -> Compiled:
        return Compiled(function, 0.0, False)

    def interpreted(program: Any, *_: Any) -> Interpreted:
        return Interpreted(program)

    monkeypatch.setattr(kernels, "_registry", {})
    monkeypatch.setattr(loops, "compile_loop", as_it_is)
    monkeypatch.setattr(perturb_kernels, "compile_function", as_it_is)
    monkeypatch.setattr(head, "_compiled", {})
    monkeypatch.setattr(head, "compile_function", as_it_is)
    monkeypatch.setattr(compiled_engine, "compile_regions", interpreted)
