"""Fixtures for all tests of passes: shapes are recomputed after each pass, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.uncompiled import compile_nothing
from zowrap.compiler import program


@pytest.fixture(scope="module", autouse=True)
def check_shapes_and_compile_nothing() -> Iterator[None]:
    """Apply to a whole test file, because its tests share programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "CHECK_SHAPES", True)
        compile_nothing(patch)
        yield
