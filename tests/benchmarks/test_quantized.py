"""docs/quantized.md is what the committed figures give; the quadratic shows what the text says."""

from __future__ import annotations

from benchmarks import quantized, quantized_floor, quantized_report


def test_the_page_is_generated() -> None:
    figures = [quantized.read(file) for file in (quantized.CELLS, quantized.NOISE, quantized.FLOOR)]
    assert quantized_report.DOCS.read_text(encoding="utf-8") == quantized_report.document(*figures)


def test_the_table_shows_the_rate_with_the_best_dev_accuracy() -> None:
    line = {"form": "int8 scales", "seed": 0, "bytes": 2**20, "elements": 7, "zero_shot": 0.5}
    lines = [
        {**line, "lr": 1e-3, "dev_accuracy": 0.6, "test_accuracy": 0.7},
        {**line, "lr": 1e-2, "dev_accuracy": 0.5, "test_accuracy": 0.9},
        {**line, "lr": 1e-3, "dev_accuracy": 0.6, "test_accuracy": 0.8, "seed": 1},
    ]
    (row,) = quantized_report.table(lines).splitlines()[2:]
    assert "| 0.001 | 0.500 | 0.750 ± 0.071 | +25.0 points | 2 |" in row


def test_rounding_makes_one_direction_per_write_worse_than_none() -> None:
    """A smaller η does not help; exact arithmetic descends."""
    exact, rounded = quantized_floor.REMEDIES[:2]
    assert quantized_floor.descend(exact, 400, 1.0) < 1
    assert quantized_floor.descend(rounded, 400, 1.0) > 1
    assert quantized_floor.descend(rounded, 400, 0.25) > 1
