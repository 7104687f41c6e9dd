"""The GPU benchmark, on whatever there is: every kind of row runs, and the page is made from what it wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import docs, measure_case
from benchmarks.gpu.cases import CASES, FIRST

ROWS = ("gaussian", "classic MeZO", *FIRST)


def run(case: Any, *rows: str) -> list[dict[str, Any]]:
    return list(measure_case.run(dataclasses.replace(case.tiny(), rows=rows), rounds=1))


@pytest.mark.slow
def test_rows_of_all_kinds_are_measured() -> None:
    records = run(CASES[0], *ROWS)
    assert [r["row"] for r in records] == list(ROWS) and not any("error" in r for r in records)
    assert all(r["seconds"]["median"] > 0 for r in records)
    ours, classic, *first = records
    assert ours["ratio"]["median"] > 0 and classic["ratio"]["median"] > 0
    assert ours["costs"]["integer_operations"] > 0 and ours["costs"]["bytes"] > 0
    assert all("ratio" not in r for r in first)


@pytest.mark.slow
def test_quantised_rows_are_measured() -> None:
    (record,) = run(next(c for c in CASES if c.int8), "scales")
    assert record["ratio"]["median"] > 0 and record["costs"]["bytes"] > 0


@pytest.mark.parametrize(
    ("case", "row"),
    [
        pytest.param(CASES[0], "LoRA r8", marks=pytest.mark.slow),
        pytest.param(next(c for c in CASES if c.int8), "adapters", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_measured_against_forwards_with_adapters(
    case: Any, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, seen = measure_case.contenders.make_contender, {}

    def note(name: str, model: torch.nn.Module, batch: Any) -> Any:
        seen[name] = any("lora_A" in each for each, _ in model.named_modules())
        return make(name, model, batch)

    monkeypatch.setattr(measure_case.contenders, "make_contender", note)
    (record,) = run(case, row)
    assert record["row"] == row and record["ratio"]["median"] > 0
    assert seen.items() >= {(measure_case.contenders.YARDSTICK, True), ("two eager forwards", True)} and all(
        seen.values()
    )


@pytest.mark.slow
def test_a_row_that_does_not_fit_says_so_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    make = measure_case.contenders.make_contender

    def refuse(name: str, *rest: Any) -> Any:
        if name == "classic MeZO":
            raise torch.cuda.OutOfMemoryError
        return make(name, *rest)

    monkeypatch.setattr(measure_case.contenders, "make_contender", refuse)
    failed, done = run(CASES[0], "classic MeZO", "two eager forwards")
    assert failed["error"] == "does not fit" and "error" not in done


def test_the_page_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    monkeypatch.setattr(command.measure, "describe_machine", lambda: {"gpu": "NVIDIA Some GPU", "torch": "2.0"})
    row = {
        "case": "a case",
        "row": "gaussian",
        "seconds": {"median": 0.5, "low": 0.4, "high": 0.6},
        "ratio": {"median": 1.25, "low": 1.2, "high": 1.3},
        "resting": 10**9,
        "inference": 10**9,
        "peak": 3 * 10**9,
        "costs": {"bytes": 150, "bytes_of_two_forwards": 100, "integer_operations": 2 * 10**9},
    }
    command._keep([row, {"case": "a case", "row": "AdamW", "error": "does not fit"}], rounds=3)
    command._keep([{**row, "case": "another"}], rounds=3)  # a later run of other cases keeps these
    (path,) = tmp_path.glob("*.json")
    assert path.name == "nvidia-some-gpu.json"
    text = docs.page([docs.read_result(path)])
    assert "| gaussian | 500.0 ms | 1.25 (1.20–1.30) | 3.00 GB | 1.50 | 1.50 | 2 G |" in text
    assert "does not fit" in text and "### another" in text


def test_without_figures_the_page_says_that_there_are_none() -> None:
    assert "Nothing on this page has been measured" in docs.page([])


def test_the_committed_page_is_what_the_results_give() -> None:
    results = [docs.read_result(path) for path in sorted(docs.RESULTS.glob("*.json"))]
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(results)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "run"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2 and "no NVIDIA GPU" in capsys.readouterr().err
