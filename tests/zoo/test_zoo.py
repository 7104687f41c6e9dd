"""Tiny models of all transformers families: what held for the committed results holds still.

A sample by default; ``make test-slow`` checks all of them eagerly, one of each model type captured, and some as
machine code. ``python -m tests.zoo`` renews the results.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from tests.zoo import checks, results

EAGER, COMPILED, INDUCTOR = (results.holding(check) for check in results.CHECKS)
CAPTURED = results.one_of_each_type(COMPILED)


# Capturing these takes several times as long as capturing others.
LARGE = ("causal:afmoe", "causal:inkling2_text")


def every(names: list[str], step: int, without: Collection[str] = ()) -> list[pytest.param]:
    """All names, of which only each ``step``-th of those that are not ``without`` is in the default suite."""
    return slow_except([name for name in names if name not in without][::step], names)


# In classes, because ``make test-slow`` hands out whole classes to its processes.
class TestEager:
    @pytest.mark.parametrize("family", every(EAGER, 25))
    def test_the_loss_is_the_models_own(self, family: str, tmp_path: Path) -> None:
        checks.check_eager(family, tmp_path)


class TestCaptured:
    @pytest.mark.parametrize("family", every(CAPTURED, 75, without=LARGE))
    def test_the_program_equals_the_eager_engine(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_nothing(monkeypatch)
        checks.check_compiled(family)


class TestMachineCode:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", INDUCTOR)
    def test_it_equals_the_eager_engine(self, family: str) -> None:
        checks.check_compiled(family)


def test_enough_families_hold() -> None:
    assert len(EAGER) >= 500 and len(CAPTURED) >= 200 and len(INDUCTOR) >= 25


def test_the_page_is_made_from_the_results() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(results.read())
