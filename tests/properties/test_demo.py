"""The demo and its benchmark: their pieces, and that what they print is theirs alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import demo as benchmark
from examples import demo

ROOT = Path(__file__).parents[2]


def test_changed_answers_are_the_first_in_order_worse_ones_too() -> None:
    rows = [{"text": str(i), "label": "a"} for i in range(5)]
    before = [{"prediction": answer} for answer in "abaab"]
    after = [{"prediction": answer} for answer in "aabba"]
    assert demo.changed_answers(rows, before, after, 2) == [(rows[1], "b", "a"), (rows[2], "a", "b")]


def test_the_held_out_rows_are_of_the_training_file(tmp_path: Path) -> None:
    train, dev = (path.read_text(encoding="utf-8").splitlines() for path in demo.split_training_file(tmp_path))
    whole = (demo.DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert (len(train), len(dev)) == (400, 80)
    assert sorted(train + dev) == sorted(whole)


def test_a_process_is_measured_and_its_failure_told() -> None:
    record, seconds, peak = demo.measured([sys.executable, "-c", "print('{\"a\": 1}')"])
    assert record == {"a": 1} and seconds > 0 and peak > 1
    with pytest.raises(SystemExit, match="ended with 3: no message"):
        demo.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_table_has_a_row_for_every_way() -> None:
    run = {"seed": 0, "test": 0.75, "seconds": 10.4, "peak_mb": 1234.0}
    record = {"rows": 240, "before": 0.675, "runs": {way: [run] * 3 for way in benchmark.METHODS}}
    lines = benchmark.table(record).splitlines()
    assert len(lines) == 3 + len(benchmark.METHODS)
    assert lines[3].endswith("| 0.750, 0.750, 0.750 | 0.69 to 0.80 | 10 | 1.2 GB |")


def test_eval_of_a_sentence_encoder_prints_our_lines_alone() -> None:
    """No notice of a library that transformers imports beside what it needs."""
    command = [sys.executable, "-m", "zowrap.cli", "eval", demo.minilm(), "--max-eval-examples", "8"]
    done = subprocess.run(
        [*command, "--data", str(demo.DATA / "test.jsonl")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "zowrap 0.1.0",
        "classification by sentence",
        "float32 (it fits in memory)",
    ]
    assert done.stdout.startswith("loss ") and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_demo_runs_and_prints_its_own_lines_alone(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "--steps", "2", "--out", str(tmp_path / "RUN")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "the same, by plain transformers" in done.stdout
    foreign = ("Warning", "Failed to load", "site-packages", "W1", "Loading weights")
    assert not [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(foreign)]
