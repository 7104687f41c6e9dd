"""Run cells: a form of the weights on a task, with a learning rate and a seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import zowrap
from benchmarks.papers.finetune import Cell, Workbench
from benchmarks.quantized.forms import FORMS, FORWARDS, SEEDS
from benchmarks.quantized.results import CELLS, NOISE, best_rate, read_lines, write_lines
from zowrap import quant, rules
from zowrap.calibration.noise_floor import noise_floor
from zowrap.quant import lowering
from zowrap.quant.modes import count_saturated_rows


class QuantizedBench(Workbench):
    """Holds a model in one form and the rows of a task, and runs cells one after the other.

    Args:
        lm: the folder of a language model; without it the task is TREC.
    """

    def __init__(self, name: str, data_dir: Path, engine: str | None = None, lm: str | None = None) -> None:
        self.form_name, self.setup, self.lm = name, FORMS[name], lm
        self.kind = "lm" if lm else "classification"
        super().__init__(self.cell(0.0, 0), data_dir, engine)
        if self.setup.quantization is not None or self.setup.dtype != torch.float32:
            self.source.quantization = self.setup.quantization
            self.model = self.task.build(self.source, self.setup.dtype)
        # Lower first: on some processors the library's own 4-bit layers do not support all shapes of these models.
        self.codes = {name: layer.get_parameter("weight").clone() for name, layer in quant.lower(self.model).items()}
        self.untuned = self.evaluate(self.dev)
        self.memory = sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *self.model.buffers()])
        self.zero_shot = self.evaluate(self.test)
        self._zm: zowrap.ZOModel | None = None

    def cell(self, lr: float, seed: int) -> Cell:
        """A cell of this form with the right number of steps."""
        steps = FORWARDS[self.kind] // (2 * self.setup.queries)
        cell = Cell("trec", "meazo", lr, seed, steps, eps=self.setup.eps)
        return replace(cell, task="sst2", model=self.lm, max_length=64) if self.lm else cell

    def reset(self, cell: Cell) -> zowrap.ZOModel:
        """Restore the wrapped model to its state before the first step, with the cell's seed and learning rate."""
        if self._zm is None:
            self._zm = zowrap.zo_wrap(
                self.model,
                rules.get("meazo"),
                eps=cell.eps,
                trainable=self.trainable if self.setup.quantized is None else None,
                loss_fn=self.task.loss_fn,
                quantized=self.setup.quantized,
                queries=self.setup.queries,
                engine=self.engine,
                **self.setup.wrap,
            )
            self._state = self._zm.state_dict()
            self.start = {p.name: p.tensor.detach().clone() for p in self._zm.parameters}
        zm = self._zm
        with torch.no_grad():
            for parameter in zm.parameters:
                parameter.tensor.copy_(self.start[parameter.name])
        zm.load_state_dict({**self._state, "seed": cell.seed, "lr": cell.lr})
        return zm

    def run_line(self, cell: Cell) -> dict[str, Any]:
        """Run a cell, and add what moved and the size of the weights to its line."""
        found = self.run(cell, evaluations=1)
        assert self._zm is not None
        codes = [p.tensor for p in self._zm.parameters if p.codes]
        layers = {name.replace(".base_layer", ""): layer for name, layer in lowering.lowered_layers(self.model).items()}
        moved = [
            float(torch.ne(layers[name].get_parameter("weight"), before).float().mean())
            for name, before in self.codes.items()
        ]
        return {
            "form": self.form_name,
            "queries": self.setup.queries,
            **found,
            "model": Path(cell.model).name,
            "zero_shot": self.zero_shot["accuracy"],
            "zero_shot_loss": self.zero_shot["loss"],
            "bytes": self.memory,
            "elements": self._zm.inspect().elements,
            **({"codes_moved": [min(moved), max(moved)]} if moved else {}),
            **({"saturated_rows": sum(map(count_saturated_rows, codes))} if codes else {}),
        }


def run_missing(data_dir: Path, lm: str | None, only: list[str], seeds: int, rates: int, engine: str | None) -> None:
    """Run every cell that is missing from the results, beginning with the grid of seed 0."""
    lines = read_lines(CELLS)
    task = "sst2" if lm else "trec"
    done = {(line["task"], line["form"], line["lr"], line["seed"]) for line in lines}
    for name in only or FORMS:
        bench: QuantizedBench | None = None
        grid = FORMS[name].lm_rates if lm else FORMS[name].rates
        for lr, seed in [*((lr, 0) for lr in grid[:rates]), *((None, s) for s in SEEDS[1:seeds])]:
            lr = best_rate(lines, name, task) if lr is None else lr
            if (task, name, lr, seed) in done:
                continue
            bench = bench or QuantizedBench(name, data_dir, engine, lm)
            line = bench.run_line(bench.cell(lr, seed))
            lines = [*read_lines(CELLS), line]  # another process may have added lines
            write_lines(CELLS, lines)
            shown = ("form", "lr", "seed", "zero_shot", "dev_accuracy", "test_accuracy", "zero_shot_loss", "test_loss")
            print(*(lines[-1][key] for key in shown), f"{lines[-1]['cpu_seconds']} s", flush=True)


def measure_noise(data_dir: Path, only: list[str]) -> None:
    """Measure the noise floor at several ε, to see where the rounding of 8-bit activations takes over."""
    lines = []
    for name in only or ("int8 scales", "int8 adapters", "int8 codes"):
        bench = QuantizedBench(name, data_dir)
        zm = bench.reset(bench.cell(1e-3, 0))
        batch = next(bench.stream(16, 0))
        for eps in (1e-1, 3e-2, 1e-2, 3e-3):
            found = noise_floor(zm, batch, eps=eps, directions=12)
            lines.append({"form": name, "eps": eps, **found.record()})
            print(lines[-1], flush=True)
        write_lines(NOISE, [line for line in read_lines(NOISE) if line["form"] != name] + lines)
        lines = []
