"""Golden runs give the digests that are kept: a change that is to alter no number alters none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden import digest
from tests.golden.configurations import CONFIGURATIONS
from tests.golden.runs import run

KEPT = digest.read_digests()
ELSEWHERE = digest.environment_differences(KEPT["environment"])
NAMES = [
    pytest.param(name, marks=[] if configuration.default else [pytest.mark.slow])
    for name, configuration in CONFIGURATIONS.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_computes_what_it_always_did(name: str, tmp_path: Path) -> None:
    """Every bit where the digests were written in this environment, else what is portable and a few numbers nearly."""
    configuration = CONFIGURATIONS[name]
    for package in configuration.needs:
        pytest.importorskip(package)
    found = run(configuration.run, tmp_path).digests()
    exact = not ELSEWHERE or configuration.portable
    differences = digest.compare(KEPT["runs"].get(name), found, exact, configuration.loose)
    assert not differences, f"{name} differs in {', '.join(differences)}: see python -m tests.golden '{name}'"


def test_every_bit_is_compared_here() -> None:
    """Skipped where the tests above compare in part, so that it is told."""
    if ELSEWHERE:
        pytest.skip(f"digests of another environment: {'; '.join(ELSEWHERE)}")


def test_digests_are_kept_of_every_run_and_of_no_other() -> None:
    assert KEPT["runs"].keys() == CONFIGURATIONS.keys()
    for name, entry in KEPT["runs"].items():
        assert entry["digests"].keys() >= {"files"} or entry["digests"].keys() >= {"weights", "state", "records"}, name


@pytest.mark.parametrize(
    "one, other",
    [
        ({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, -0.0])}),
        ({"w": torch.ones(2)}, {"w": torch.ones(2).nextafter(torch.tensor(2.0))}),
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}),
        ({"w": torch.ones(2)}, {"w": torch.ones(2, 1)}),
        ({"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.float64)}),
        ({"w": torch.ones(4, dtype=torch.bfloat16)}, {"w": torch.ones(4, dtype=torch.float16)}),
        ([{"loss": 0.1}], [{"loss": 0.1 + 2**-55}]),
        ([[1], []], [[], [1]]),
        ({"step": 1}, {"step": 1, "skipped": False}),
    ],
)
def test_every_bit_name_and_shape_counts(one: object, other: object) -> None:
    assert digest.digest(one) == digest.digest(one) != digest.digest(other)


def test_elsewhere_numbers_are_compared_within_tolerances() -> None:
    kept = {"digests": {"weights": "a", "state": "b"}, "near": {"first": 2.0, "last:eval": 1.0}}
    close = {"digests": {"weights": "x", "state": "b"}, "near": {"first": 2.0001, "last:eval": 1.0001}}
    assert digest.compare(kept, close, exact=False) == []
    assert digest.compare(kept, close, exact=True) == ["weights"]
    far = {"digests": kept["digests"], "near": {"first": 2.001, "last:eval": float("nan")}}
    assert len(digest.compare(kept, far, exact=False)) == 2
    assert digest.compare(kept, {**close, "near": {"first": 2.0}}, exact=False) == ["last:eval is gone"]
    assert digest.compare(kept, far, exact=False, loose=True) == ["last:eval (1 before, nan now)"]
    assert digest.compare(None, close, exact=False) == ["it has no digests yet"]
