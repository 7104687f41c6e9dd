"""docs/quantized.md is what the committed figures give; the quadratic shows what the text says."""

from __future__ import annotations

from benchmarks.quantized import code_noise, report, results, sixteen_bit


def test_the_page_is_generated() -> None:
    assert report.DOCS.read_text(encoding="utf-8") == report.document(*results.read_figures())


def test_the_table_shows_the_rate_with_the_best_dev_accuracy() -> None:
    line = {"form": "int8 scales", "task": "trec", "seed": 0, "bytes": 2**20, "elements": 7, "zero_shot": 0.5}
    lines = [
        {**line, "lr": 1e-3, "dev_accuracy": 0.6, "test_accuracy": 0.7},
        {**line, "lr": 1e-2, "dev_accuracy": 0.5, "test_accuracy": 0.9},
        {**line, "lr": 1e-3, "dev_accuracy": 0.6, "test_accuracy": 0.8, "seed": 1},
    ]
    (row,) = report.form_table(lines, "trec").splitlines()[2:]
    assert "| 0.001 | 0.500 | 0.750 ± 0.071 | +25.0 points | 2 |" in row


def test_language_models_are_chosen_and_compared_by_loss() -> None:
    line = {"form": "int8 scales", "task": "sst2", "seed": 0, "bytes": 2**20, "elements": 7, "zero_shot_loss": 4.0}
    lines = [
        {**line, "lr": 1e-3, "dev_accuracy": 0.1, "dev_loss": 3.0, "test_loss": 3.5},
        {**line, "lr": 1e-2, "dev_accuracy": 0.2, "dev_loss": 3.5, "test_loss": 3.0},
        {**line, "lr": 1e-1, "dev_accuracy": None, "dev_loss": None, "test_loss": None},
    ]
    (row,) = report.form_table(lines, "sst2").splitlines()[2:]
    assert "| 0.001 | 4.000 | 3.500 | -0.500 | 1 |" in row
    assert report.form_table(lines, "trec").splitlines()[2:] == []


def test_a_floor_that_means_nothing_is_not_shown() -> None:
    line = {"form": "int8 scales", "rounding": 0.3, "agreement": 0.9, "against": 0.03}
    lines = [{**line, "eps": 0.1, "slope": 2.0, "floor": 0.075}, {**line, "eps": 0.01, "slope": None, "floor": None}]
    rows = report.noise_table(lines).splitlines()[2:]
    assert rows[0] == "| int8 scales | 0.1 | 2 | 0.3 | 0.075 | 90% with ε 0.03 |"
    assert rows[1] == "| int8 scales | 0.01 | below rounding | 0.3 | below rounding | 90% with ε 0.03 |"


def test_what_became_of_the_codes_is_told() -> None:
    lines = [{"form": "int8 scales", "codes_moved": [0.0, 0.0]}, {"form": "fp32"}]
    lines += [{"form": "int8 codes", "codes_moved": [0.5, 0.9]}, {"form": "int8 codes", "codes_moved": [0.25, 0.9]}]
    told = report.describe_code_changes(lines)
    assert "the codes of int8 scales." in told and "With int8 codes, 25% of the codes or more changed" in told


def test_the_peak_of_a_step_is_set_against_that_of_a_forward() -> None:
    mib = 2**20
    line = {"form": "int8 scales", "model": "m", "batch": [1, 32], "weights": 90 * mib, "forward": 10 * mib}
    row = report.memory_table([{**line, "held": 91 * mib, "step": 14 * mib}]).splitlines()[-1]
    assert row == "| int8 scales | m, 1 × 32 | 90.0 | 91.0 | 10.0 | 14.0 | +5.0% |"


def test_a_direction_that_was_not_evaluated_costs_progress() -> None:
    drawn, evaluated = list(sixteen_bit.VARIANTS)[1:3]
    assert sixteen_bit.descend(evaluated, 1e-3, 1.0, 200) < sixteen_bit.descend(drawn, 1e-3, 1.0, 200) - 0.05


def test_rounding_makes_one_direction_per_write_worse_than_none() -> None:
    """A smaller η does not help; exact arithmetic descends."""
    exact, rounded = code_noise.REMEDIES[:2]
    assert code_noise.descend(exact, 400, 1.0) < 1
    assert code_noise.descend(rounded, 400, 1.0) > 1
    assert code_noise.descend(rounded, 400, 0.25) > 1
