"""Tiny models of all transformers families: what held for the committed results holds still.

A sample by default; ``make test-slow`` checks all of them eagerly, one of each model type captured, and some as
machine code. ``python -m tests.zoo`` renews the results.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.uncompiled import compile_nothing
from tests.zoo import checks, results

EAGER, COMPILED, INDUCTOR = (results.holding(check) for check in results.CHECKS)
CAPTURED = results.one_of_each_type(COMPILED)


def every(names: list[str], step: int) -> list[pytest.param]:
    """All names, of which only each ``step``-th is in the default suite."""
    return [pytest.param(n, marks=() if i % step == 0 else pytest.mark.slow) for i, n in enumerate(names)]


@pytest.mark.parametrize("family", every(EAGER, 25))
def test_the_eager_engine_evaluates_the_models_own_loss(family: str, tmp_path: Path) -> None:
    checks.check_eager(family, tmp_path)


@pytest.mark.parametrize("family", every(CAPTURED, 40))
def test_the_captured_program_equals_the_eager_engine(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    checks.check_compiled(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", INDUCTOR)
def test_machine_code_equals_the_eager_engine(family: str) -> None:
    checks.check_compiled(family)


def test_enough_families_hold() -> None:
    assert len(EAGER) >= 500


def test_the_page_is_made_from_the_results() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(results.read())
