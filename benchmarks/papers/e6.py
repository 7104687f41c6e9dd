"""E6."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from dataclasses import replace

from benchmarks.papers.finetune import Cell, exists
from benchmarks.papers.grid import CellFile, Runner, best_of, search

NAME, TITLE = "E6", "language models: every rule at equal forwards, η by a grid, three seeds"

SCALE_FREE = (3e-4, 1e-3, 3e-3)
PLAIN = (1e-5, 3e-5, 1e-4)
GRIDS = {
    "zo_sgd": PLAIN,
    "conmezo": PLAIN,
    "lozo": PLAIN,
    "sparse_mezo": PLAIN,
    "meazo": SCALE_FREE,
    "zo_adam": SCALE_FREE,
    "radazo": (1e-4, 3e-4, 1e-3),
    "meazo_blocks": (1e-3, 3e-3, 1e-2),
}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--tasks", nargs="+"); p.add_argument("--rules", nargs="+"); p.add_argument("--steps", type=int)
    p.add_argument("--batch-size", type=int); p.add_argument("--cells", type=Path); p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--data-dir", type=Path)
    o = p.parse_args()
    runner = Runner(CellFile(o.cells), o.data_dir, say=lambda t: print(t, flush=True))
    for task in o.tasks:
        for rule in o.rules:
            cell = Cell(task, rule, 0.0, 0, o.steps, batch_size=o.batch_size)
            best = best_of(search(runner.line, cell, GRIDS[rule]))
            for seed in range(1, o.seeds):
                runner.line(replace(cell, lr=best["lr"], seed=seed))

if __name__ == "__main__":
    main()
