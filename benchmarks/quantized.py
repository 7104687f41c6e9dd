"""What each way of tuning a quantised model comes to: accuracy, loss and memory side by side.

    python -m benchmarks.quantized run --data-dir DATA     MiniLM on TREC: the cells that are missing (minutes each)
    python -m benchmarks.quantized run --data-dir DATA --lm DIR   language modelling of SST-2's sentences by a model
    python -m benchmarks.quantized memory                  what a step holds at its peak (a minute a form)
    python -m benchmarks.quantized noise --data-dir DATA   the rounding of 8-bit activations against ε
    python -m benchmarks.quantized floor                   the noise of rounded codes on a quadratic (a minute)
    python -m benchmarks.quantized sixteen                 16-bit weights on a quadratic (minutes)
    python -m benchmarks.quantized docs                    docs/quantized.md from the committed figures

A cell is a run of 2,400 forward passes on TREC, 600 of language modelling; the learning rate is the one of the grid
with the best dev accuracy (loss) of seed 0, and nothing was chosen on the test rows. Lines are kept in
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import zowrap
from benchmarks import sixteen_bit
from benchmarks.papers.finetune import Cell, Workbench
from benchmarks.quantized_floor import measure
from benchmarks.quantized_memory import held_in
from benchmarks.quantized_report import write_docs
from zowrap import quant, rules
from zowrap.calibration.noise_floor import noise_floor
from zowrap.quant import lowering
from zowrap.quant.modes import count_saturated_rows

RESULTS = Path(__file__).parent / "results"
CELLS, NOISE, FLOOR, MEMORY, SIXTEEN = (
    RESULTS / f"quantized{end}.json" for end in ("", "_noise", "_floor", "_memory", "_sixteen_bit")
)
INT8: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class Form:
    """A row of the table: how the weights are held and how they move.

    Attributes:
        rates: the grid of learning rates on TREC.
        lm_rates: in language modelling.
        queries: directions per step; the steps are so many fewer.
    """

    rates: tuple[float, ...]
    lm_rates: tuple[float, ...]
    eps: float
    quantization: dict[str, Any] | None = None
    quantized: str | None = None
    dtype: torch.dtype = torch.float32
    queries: int = 1
    wrap: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "fp32": Form((4e-4, 1e-3), (1e-3, 3e-3), 1e-3),
    "bf16": Form((4e-4, 1e-3), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16),
    "bf16, evaluated": Form((4e-4,), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16, wrap={"along": "evaluated"}),
    "bf16, masters": Form((4e-4,), (1e-3, 3e-3), 1e-2, dtype=torch.bfloat16, wrap={"masters": True}),
    "bf16, ε 0.001": Form((4e-4,), (1e-3, 3e-3), 1e-3, dtype=torch.bfloat16),
    "bf16, ε 0.001, evaluated": Form((4e-4,), (1e-3, 3e-3), 1e-3, dtype=torch.bfloat16, wrap={"along": "evaluated"}),
    "int8 scales": Form((8e-3, 4e-3), (1e-2, 3e-3), 1e-1, INT8, "scales"),
    "int8 scales, ε 0.01": Form((8e-3,), (1e-2, 3e-3), 1e-2, INT8, "scales"),
    "int8 adapters": Form((1.5e-3, 3e-3), (1e-2, 3e-3), 3e-2, INT8, "adapters"),
    "int8 codes": Form((4e-4,), (1e-3, 3e-3), 3e-3, INT8, "codes"),
    "int8 codes, 64 queries": Form((3e-3, 1e-3), (1e-2, 3e-3), 3e-3, INT8, "codes", queries=64),
    "nf4 adapters": Form((1.5e-3, 3e-3), (1e-2, 3e-3), 3e-2, NF4, "adapters"),
}
FORWARDS = {"classification": 2400, "lm": 600}
SEEDS = (0, 1, 2)


class QuantizedBench(Workbench):
    """A model in one form and a task's rows, ready to run cells one after the other.

    Args:
        lm: the folder of a language model; without it the task is TREC.
    """

    def __init__(self, name: str, data_dir: Path, engine: str | None = None, lm: str | None = None) -> None:
        self.form_name, self.way, self.lm = name, FORMS[name], lm
        self.kind = "lm" if lm else "classification"
        super().__init__(self.cell(0.0, 0), data_dir, engine)
        if self.way.quantization is not None or self.way.dtype != torch.float32:
            self.source.quantization = self.way.quantization
            self.model = self.task.build(self.source, self.way.dtype)
        # Lowered first: on some processors the library's own 4-bit layers take fewer shapes than the models here have.
        self.codes = {name: layer.get_parameter("weight").clone() for name, layer in quant.lower(self.model).items()}
        self.untuned = self.evaluate(self.dev)
        self.memory = sum(t.numel() * t.element_size() for t in [*self.model.parameters(), *self.model.buffers()])
        self.zero_shot = self.evaluate(self.test)
        self._zm: zowrap.ZOModel | None = None

    def cell(self, lr: float, seed: int) -> Cell:
        steps = FORWARDS[self.kind] // (2 * self.way.queries)
        cell = Cell("trec", "meazo", lr, seed, steps, eps=self.way.eps)
        return replace(cell, task="sst2", model=self.lm, max_length=64) if self.lm else cell

    def reset(self, cell: Cell) -> zowrap.ZOModel:
        """The wrapped model before its first step, what moves as it was then."""
        if self._zm is None:
            self._zm = zowrap.zo_wrap(
                self.model,
                rules.get("meazo"),
                eps=cell.eps,
                trainable=self.trainable if self.way.quantized is None else None,
                loss_fn=self.task.loss_fn,
                quantized=self.way.quantized,
                queries=self.way.queries,
                engine=self.engine,
                **self.way.wrap,
            )
            self._state = self._zm.state_dict()
            self.start = {p.name: p.tensor.detach().clone() for p in self._zm.parameters}
        zm = self._zm
        with torch.no_grad():
            for parameter in zm.parameters:
                parameter.tensor.copy_(self.start[parameter.name])
        zm.load_state_dict({**self._state, "seed": cell.seed, "lr": cell.lr})
        return zm

    def line(self, cell: Cell) -> dict[str, Any]:
        """Run a cell; its line also says what moved and what it weighs."""
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
            "queries": self.way.queries,
            **found,
            "model": Path(cell.model).name,
            "zero_shot": self.zero_shot["accuracy"],
            "zero_shot_loss": self.zero_shot["loss"],
            "bytes": self.memory,
            "elements": self._zm.inspect().elements,
            **({"codes_moved": [min(moved), max(moved)]} if moved else {}),
            **({"saturated_rows": sum(map(count_saturated_rows, codes))} if codes else {}),
        }


def read(file: Path) -> list[dict[str, Any]]:
    """The lines kept so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n", encoding="utf-8")


def best_rate(lines: list[dict[str, Any]], form: str, task: str) -> float:
    """The learning rate with the best dev accuracy of seed 0 on TREC, the best dev loss in language modelling."""
    first = [line for line in lines if (line["form"], line["task"], line["seed"]) == (form, task, 0)]
    if task == "trec":
        return float(max(first, key=lambda line: line["dev_accuracy"] or 0.0)["lr"])
    return float(min(first, key=lambda line: math.inf if line["dev_loss"] is None else line["dev_loss"])["lr"])


def run(data_dir: Path, lm: str | None, only: list[str], seeds: int, rates: int, engine: str | None) -> None:
    """Every cell that is missing, the grid of seed 0 first."""
    lines = read(CELLS)
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
            line = bench.line(bench.cell(lr, seed))
            lines = [*read(CELLS), line]  # another process may have added its own
            write(CELLS, lines)
            told = ("form", "lr", "seed", "zero_shot", "dev_accuracy", "test_accuracy", "zero_shot_loss", "test_loss")
            print(*(lines[-1][key] for key in told), f"{lines[-1]['cpu_seconds']} s", flush=True)


def noise(data_dir: Path, only: list[str]) -> None:
    """Projected gradients over ε: where the rounding of 8-bit activations takes over."""
    lines = []
    for name in only or ("int8 scales", "int8 adapters", "int8 codes"):
        bench = QuantizedBench(name, data_dir)
        zm = bench.reset(bench.cell(1e-3, 0))
        batch = next(bench.stream(16, 0))
        for eps in (1e-1, 3e-2, 1e-2, 3e-3):
            found = noise_floor(zm, batch, eps=eps, directions=12)
            lines.append({"form": name, "eps": eps, **found.record()})
            print(lines[-1], flush=True)
        write(NOISE, [line for line in read(NOISE) if line["form"] != name] + lines)
        lines = []


def figures() -> list[list[dict[str, Any]]]:
    """Everything that the page is made of."""
    return [read(file) for file in (CELLS, MEMORY, SIXTEEN, NOISE, FLOOR)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "noise", "memory", "floor", "sixteen", "docs"))
    parser.add_argument("--lm", help="folder of a language model")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rates", type=int, default=3, help="learning rates of each grid that are tried")
    parser.add_argument("--engine", choices=("compiled", "eager"), help="by default compiled")
    options = parser.parse_args()
    if options.what == "run":
        run(options.data_dir, options.lm, options.only, options.seeds, options.rates, options.engine)
    elif options.what == "noise":
        noise(options.data_dir, options.only)
    elif options.what == "memory":
        for name in options.only or FORMS:
            kept = [line for line in read(MEMORY) if line["form"] != name]
            write(MEMORY, [*kept, *held_in(name)])
    elif options.what == "floor":
        write(FLOOR, measure())
    elif options.what == "sixteen":
        write(SIXTEEN, sixteen_bit.measure())
    else:
        write_docs(*figures())


if __name__ == "__main__":
    main()
