"""The comparison of lr="auto" with the grid: what is computed from the cells, and that the documentation shows it."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import auto_lr
from zowrap.calibration.learning_rate import SHARE


def cell(lr: float, seed: int, loss: float | None, accuracy: float, **more):
    curve = [{"step": step, "loss": loss} for step in (0, 50, 100)]
    same = {"task": "t", "rule": "meazo", "steps": 100, "batch_size": 8, "forwards": 200}
    return {**same, "lr": lr, "seed": seed, "dev_loss": loss, "dev_accuracy": accuracy, "test_accuracy": accuracy,
            "curve": curve, **more}  # fmt: skip


def test_the_grids_best_is_compared_seed_by_seed():
    cells = [cell(1e-3, 0, 1.0, 0.5), cell(3e-3, 0, None, 0.1), cell(3e-4, 0, 1.2, 0.9), cell(1e-3, 1, 1.1, 0.7)]
    cells.append(cell(1e-3, 0, 0.1, 1.0) | {"steps": 50})
    autos = [cell(2e-3, seed, 1.0, 0.6, choice={"forwards": 10}) for seed in (1, 0)]
    (row,) = auto_lr.compare_runs(cells, autos)
    assert row["grid_lr"] == 1e-3 and row["grid_test_accuracy"] == [0.5, 0.7] and row["auto_test_accuracy"] == [0.6] * 2
    assert row["grid_forwards"] == 600 and row["auto_forwards"] == 10 and row["run_forwards"] == 200
    assert "| 0.600 | 0.002, 0.002 | 0.600 | +0.0 points (2 and 2 seeds) | 200, 10, 600 |" in auto_lr.format_table(
        [row]
    )
    half, whole = auto_lr.horizons(cells, [row])
    assert whole["auto"] == pytest.approx(2e-3) and half["auto"] == pytest.approx(2e-3 * 2**0.5)
    assert "0.0003: 1.200, **0.001: 1.000**, 0.003: not finite" in auto_lr.horizon_table([whole])


def test_the_documentation_shows_the_stored_result():
    result = json.loads(auto_lr.RESULT.read_text(encoding="utf-8"))
    text = auto_lr.DOCS.read_text(encoding="utf-8")
    assert auto_lr.format_table(result["rows"]) in text and auto_lr.horizon_table(result["horizons"]) in text
    assert result["share"] == SHARE and f"F(σ_T) = {SHARE:g} · f(θ)" in text
