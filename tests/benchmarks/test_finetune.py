"""Fine-tuning cells: the same run as ``zowrap tune``, reset exactly, resumable; the search over η."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.papers.finetune import Cell, Workbench, key_of
from benchmarks.papers.grid import CellFile, Runner, best_of, half_decade, index_of, search
from tests.conftest import reviews, write_rows
from zowrap.errors import ZOError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one task, under the name of SST-2, which has a dev file."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst2").mkdir()
    for number, name in enumerate(("train", "dev", "test")):
        write_rows(folder / "sst2" / f"{name}.jsonl", reviews(26, seed=number))
    return folder


@pytest.fixture
def cell(models: dict[str, Path]) -> Cell:
    return Cell(
        "sst2", "meazo", 1e-3, 3, steps=9, batch_size=4, model=str(models["encoder"]), dev_rows=20, test_rows=20
    )


def test_a_cell_is_what_tune_does(cell, data_dir, tmp_path, zowrap_cli):
    bench = Workbench(cell, data_dir, engine="eager")
    bench.run(cell)  # more steps than an epoch has batches
    data = ("--data", data_dir / "sst2" / "train.jsonl", "--out", tmp_path / "run")
    options = ("--rule", "meazo", "--lr", 1e-3, "--seed", 3, "--steps", 9, "--batch-size", 4, "--max-length", 32)
    done = zowrap_cli("tune", cell.model, *data, *options, "--engine", "eager", "--json")
    assert done.code == 0, done.err
    tuned = load_file(tmp_path / "run" / "model.safetensors")
    ours = dict(bench.model.module.named_parameters())
    moved = [name for name in tuned if not torch.equal(ours[name], bench.start[f"module.{name}"])]
    assert moved
    assert all(torch.equal(tuned[name], ours[name]) for name in tuned)


def test_a_workbench_starts_every_cell_from_the_checkpoint(cell, data_dir):
    bench = Workbench(cell, data_dir, engine="eager")
    first = bench.run(replace(cell, rule="radazo"))
    bench.run(replace(cell, rule="radazo", lr=1e-2, seed=4))
    again = bench.run(replace(cell, rule="radazo"))
    assert {**first, "cpu_seconds": 0} == {**again, "cpu_seconds": 0}
    assert first["forwards"] == 18
    assert [point["step"] for point in first["curve"]] == [0, 3, 6, 9]


def test_a_diverged_cell_is_kept_as_json(cell, data_dir, tmp_path):
    runner = Runner(CellFile(tmp_path / "cells.jsonl"), data_dir, "eager", say=lambda text: None)
    diverged = runner.line(replace(cell, rule="zo_sgd", lr=1e30))
    assert diverged["dev_loss"] is None
    assert json.loads((tmp_path / "cells.jsonl").read_text())["dev_loss"] is None
    assert best_of([diverged, {"dev_loss": 3.0}]) == {"dev_loss": 3.0}


def test_finished_cells_are_read_back_and_not_run_again(cell, data_dir, tmp_path):
    file = CellFile(tmp_path / "cells.jsonl")
    line = Runner(file, data_dir, "eager", say=lambda text: None).line(cell)
    assert key_of(line) == cell.key()
    # A folder without data: whatever had to be run would fail.
    again = Runner(CellFile(tmp_path / "cells.jsonl"), tmp_path / "nothing")
    assert again.line(cell) == line
    with pytest.raises(ZOError, match="no data folder"):
        again.line(replace(cell, seed=4))


def test_half_decades_are_the_numbers_one_writes():
    assert [half_decade(i) for i in range(-3, 3)] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
    assert all(index_of(half_decade(i)) == i for i in range(-14, 4))


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [(1e-3, [3e-4, 1e-3, 3e-3]), (1e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]), (1e-5, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3])],
)
def test_the_grid_grows_where_its_best_is_at_an_end(cell, optimum, tried):
    def run(cell: Cell) -> dict:
        return {"lr": cell.lr, "dev_loss": abs(index_of(cell.lr) - index_of(optimum))}

    assert [line["lr"] for line in search(run, cell, (3e-4, 1e-3, 3e-3), extensions=2)] == tried
