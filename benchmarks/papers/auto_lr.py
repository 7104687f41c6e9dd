"""Compare ``lr="auto"`` with the grid, on the same tasks, steps, batches and seeds.

    python -m benchmarks.papers.auto_lr run --cells cells.jsonl --autos autos.jsonl --jobs trec:meazo:120 …
    python -m benchmarks.papers.auto_lr report --cells cells.jsonl --autos autos.jsonl

``run`` makes the runs whose η is chosen by :func:`zowrap.tune_lr` and appends one line each, a line of the cell file
(:mod:`benchmarks.papers.finetune`) with the choice's record as ``choice``. ``report`` compares them with the grid's
best η of each task and rule (lowest dev loss of seed 0, as in :mod:`benchmarks.papers.grid`) and writes
``benchmarks/results/auto_lr.json`` and the table in ``docs/learning-rate.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zowrap.calibration.learning_rate import SHARE, tune_lr

if TYPE_CHECKING:
    from benchmarks.papers.finetune import Cell, Workbench

RESULT = Path(__file__).parents[1] / "results" / "auto_lr.json"
DOCS = Path(__file__).parents[2] / "docs" / "learning-rate.md"
HORIZONS = (
    "This table follows the same runs of the grid over their course (seed 0): at a constant η, the first T steps of a "
    "run are a run of T steps. The best η (bold) falls as runs get longer. The last column is the mean choice above, "
    "scaled by 1/√T."
)
BEGIN, END = "<!-- begin generated: auto_lr -->", "<!-- end generated -->"


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a cell file; empty if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing from the file, loading and compiling each task's model once."""
    from benchmarks.papers.finetune import Cell, Workbench  # which a report does without

    done = {(line["task"], line["rule"], line["steps"], line["seed"]) for line in read_cells(options.autos)}
    benches: dict[str, Workbench] = {}
    for job in options.jobs:
        task, rule, steps = job.split(":")
        for seed in range(options.seeds):
            if (task, rule, int(steps), seed) in done:
                continue
            cell = Cell(task, rule, 1.0, seed, int(steps), batch_size=options.batch_size)
            if task not in benches:
                benches = {task: Workbench(cell, options.data_dir)}
            line = run_one(benches[task], cell)
            with options.autos.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            print(task, rule, seed, line["choice"]["lr"], line["dev_loss"], line["test_accuracy"], flush=True)


def run_one(bench: Workbench, cell: Cell) -> dict[str, Any]:
    """Choose η from the run's own first batches, then run with it."""
    zm = bench.reset(cell)
    choice = tune_lr(zm, bench.stream(cell.batch_size, cell.seed), cell.steps)
    return {**bench.run(replace(cell, lr=choice.lr)), "choice": choice.record()}


def compare_runs(cells: list[dict[str, Any]], autos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each (task, rule, steps) that has both."""
    rows = []
    for task, rule, steps in dict.fromkeys((a["task"], a["rule"], a["steps"]) for a in autos):
        auto = [a for a in autos if (a["task"], a["rule"], a["steps"]) == (task, rule, steps)]
        batch = auto[0]["batch_size"]
        same = [c for c in cells if (c["task"], c["rule"], c["steps"], c["batch_size"]) == (task, rule, steps, batch)]
        grid = sorted((c for c in same if c["seed"] == 0), key=lambda c: c["lr"])
        if not grid:
            continue
        best = min(grid, key=_dev_loss)["lr"]
        runs = [c for c in same if c["lr"] == best and c["seed"] in {a["seed"] for a in auto}]
        rows.append(
            {
                "task": task,
                "rule": rule,
                "steps": steps,
                "batch_size": batch,
                "grid": [{"lr": c["lr"], "dev_loss": c["dev_loss"], "dev_accuracy": c["dev_accuracy"]} for c in grid],
                "grid_lr": best,
                "grid_seeds": sorted(c["seed"] for c in runs),
                "grid_test_accuracy": [c["test_accuracy"] for c in sorted(runs, key=lambda c: c["seed"])],
                "grid_dev_accuracy": [c["dev_accuracy"] for c in sorted(runs, key=lambda c: c["seed"])],
                "auto_seeds": sorted(a["seed"] for a in auto),
                "auto_lr": [a["lr"] for a in sorted(auto, key=lambda a: a["seed"])],
                "auto_test_accuracy": [a["test_accuracy"] for a in sorted(auto, key=lambda a: a["seed"])],
                "auto_dev_accuracy": [a["dev_accuracy"] for a in sorted(auto, key=lambda a: a["seed"])],
                "auto_forwards": auto[0]["choice"]["forwards"],
                "run_forwards": auto[0]["forwards"],
                "grid_forwards": sum(c["forwards"] for c in grid),
            }
        )
    return rows


def _dev_loss(cell: dict[str, Any]) -> float:
    return math.inf if cell["dev_loss"] is None else cell["dev_loss"]


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| task | rule | steps | grid's best η | grid accuracy | auto η (by seed) | auto accuracy | difference "
        "| forwards: run, choice, grid |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        grid, auto = (statistics.fmean(row[f"{way}_test_accuracy"]) for way in ("grid", "auto"))
        rates = ", ".join(f"{lr:.2g}" for lr in row["auto_lr"])
        by = f" ({len(row['grid_seeds'])} and {len(row['auto_seeds'])} seeds)" if len(row["auto_seeds"]) != 3 else ""
        lines.append(
            f"| {row['task']} | `{row['rule']}` | {row['steps']} of {row['batch_size']} | {row['grid_lr']:.2g} "
            f"| {grid:.3f} | {rates} | {auto:.3f} | {100 * (auto - grid):+.1f} points{by} "
            f"| {row['run_forwards']}, {row['auto_forwards']}, {row['grid_forwards']} |"
        )
    return "\n".join(lines)


def horizons(cells: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the dev loss over the course of the grid's runs (seed 0), whose first T steps are runs of T steps."""
    found = []
    for row in rows:
        names = ("task", "rule", "steps", "batch_size")
        same = [c for c in cells if c["seed"] == 0 and all(c[name] == row[name] for name in names)]
        for mark in [point["step"] for point in same[0]["curve"] if point["step"]]:
            losses = {
                f"{c['lr']:g}": next(p["loss"] for p in c["curve"] if p["step"] == mark)
                for c in sorted(same, key=lambda c: c["lr"])
            }
            scaled = statistics.fmean(row["auto_lr"]) * (row["steps"] / mark) ** 0.5
            found.append({**{name: row[name] for name in names[:2]}, "steps": mark, "dev_loss": losses, "auto": scaled})
    return found


def horizon_table(found: list[dict[str, Any]]) -> str:
    """The table of :func:`horizons` as Markdown."""
    lines = ["| task | rule | steps | dev loss at η | auto η for that many steps |", "|---|---|---|---|---|"]
    for each in found:
        best = min(each["dev_loss"], key=lambda lr: each["dev_loss"][lr] if each["dev_loss"][lr] is not None else 1e30)
        told = ", ".join(
            f"{'**' if lr == best else ''}{lr}: {'not finite' if loss is None else format(loss, '.3f')}"
            f"{'**' if lr == best else ''}"
            for lr, loss in each["dev_loss"].items()
        )
        lines.append(f"| {each['task']} | `{each['rule']}` | {each['steps']} | {told} | {each['auto']:.2g} |")
    return "\n".join(lines)


def report(options: argparse.Namespace) -> None:
    """Write the result as JSON, and the table into the documentation."""
    rows = compare_runs(read_cells(options.cells), read_cells(options.autos))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    lengths = horizons(read_cells(options.cells), rows)
    RESULT.write_text(json.dumps({"share": SHARE, "rows": rows, "horizons": lengths}, indent=1) + "\n")
    print(write_docs(json.loads(RESULT.read_text())))


def write_docs(result: dict[str, Any]) -> str:
    """Put the tables of a result into the documentation, and return them."""
    tables = f"{format_table(result['rows'])}\n\n{HORIZONS}\n\n{horizon_table(result['horizons'])}"
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--cells", type=Path, help="the grid's cell file")
    parser.add_argument("--autos", type=Path, required=True, help="the runs with a chosen η")
    parser.add_argument("--jobs", nargs="+", default=[], help="task:rule:steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    (run if options.what == "run" else report)(options)


if __name__ == "__main__":
    main()
