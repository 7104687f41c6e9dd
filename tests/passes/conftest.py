"""What holds for every test of a pass: shapes are recomputed after it, and nothing is compiled."""

from __future__ import annotations

import pytest

from tests.support.uncompiled import compile_nothing
from zowrap.compiler import program


@pytest.fixture(autouse=True)
def check_shapes_and_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CHECK_SHAPES", True)
    compile_nothing(monkeypatch)
