"""One run: a method on a task at one setting, and the bench that makes runs one after another.

A line of the file of runs holds the fields of :class:`Run` and

=================  =================================================================================
``curve``          ``{"forwards", "seconds", "loss", "accuracy"}`` on dev rows, the untuned model first
``chosen_lr``      η, of a method that chooses it
``test``           ``{"loss", "accuracy"}`` after the last step
=================  =================================================================================

``seconds`` are of the steps alone, without evaluations and the first step, which compiles. Runs with other work beside
them are slower, so that forwards are what is compared.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zowrap
from benchmarks.forwards.methods import BATCH, Backpropagation, ForwardOnly, Method, Stepper, find
from benchmarks.papers.finetune import minilm, rows_of
from zowrap.errors import ZOError
from zowrap.loss import evaluation
from zowrap.step.blocks import layer_names
from zowrap.tasks.batches import iterate_batches
from zowrap.tasks.loading import open_source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row, sample

EVAL_BATCH = 64
# Forwards at which the dev rows are evaluated.
MARKS = (3, 6, 12, 24, 48, 96, 192, 400)


@dataclass(frozen=True)
class Task:
    """A model and data: classification by label names or words after a prompt, or language modelling of the texts.

    Attributes:
        model: ``"minilm"``, or a folder in the folder of models.
        kind: of ``zowrap tune --task``.
        data: a folder of the data.
        forwards: the budget of a run.
        text: makes a row's text of its columns.
        template: the prompt, of a language model that classifies; ``words`` are what stands for the labels in it.
        dev_rows, test_rows, max_length: numbers of rows to choose by and to report on, and of tokens.
    """

    model: str
    kind: str
    data: str
    forwards: int = 400
    text: str = "{text}"
    template: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    dev_rows: int = 256
    test_rows: int = 500
    max_length: int = 48


_GEMMA: dict[str, Any] = {"forwards": 192, "dev_rows": 128, "test_rows": 256}
_ASKED = "{premise}\nQuestion: {hypothesis} True or false?"
TASKS = {
    "minilm-trec": Task("minilm", "classification", "trec"),
    "minilm-banking77": Task("minilm", "classification", "banking77", forwards=192),
    "minilm-sst2": Task("minilm", "classification", "sst2"),
    "minilm-rte": Task("minilm", "classification", "rte", text="{premise} {hypothesis}"),
    "stories-sst2": Task("stories260k", "lm", "sst2"),
    "stories-rte": Task("stories260k", "lm", "rte", text="{premise} {hypothesis}"),
    "gemma-sst2": Task(
        "gemma-3-270m",
        "classification",
        "sst2",
        template="{text} It was {label}",
        words={"positive": "great", "negative": "terrible"},
        **_GEMMA,
    ),
    "gemma-trec": Task("gemma-3-270m", "classification", "trec", template="{text}\nThis asks about: {label}", **_GEMMA),
    "gemma-rte": Task(
        "gemma-3-270m",
        "classification",
        "rte",
        text=_ASKED,
        template="{text}\nAnswer: {label}",
        words={"entailment": "true", "not_entailment": "false"},
        **{**_GEMMA, "max_length": 128},
    ),
}


@dataclass(frozen=True)
class Run:
    """The settings of a run; ``lr`` is None where the method chooses it."""

    task: str
    method: str
    lr: float | None
    batch_size: int
    seed: int
    forwards: int

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Bench:
    """A task's model and rows, ready for runs; weights are put back between them.

    Args:
        data_dir: the folder with trec, sst2 …
        models_dir: the folder with stories260k.
    """

    def __init__(self, name: str, data_dir: Path, models_dir: Path, engine: str | None = None) -> None:
        if name not in TASKS:
            raise ZOError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
        task, self.engine = TASKS[name], engine
        train, dev, test = _read(task, data_dir)
        self.source = open_source(minilm() if task.model == "minilm" else str(models_dir / task.model))
        self.task, _ = resolve(task.kind, train, self.source, max_length=task.max_length, template=task.template)
        self.train = self.task.examples(train, self.source)
        self.collator = self.task.collator(self.source)
        self.dev, self.test = self._batches(dev), self._batches(test)
        self.model = self.task.build(self.source, torch.float32)
        self.trainable = self.task.default_trainable(self.model)
        self.start = {key: tensor.detach().clone() for key, tensor in self.model.named_parameters()}
        self.untuned = self.evaluate(self.dev)
        self._wrapped: dict[str, tuple[zowrap.ZOModel, dict[str, Any]]] = {}

    def _batches(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        examples = self.task.examples(rows, self.source)
        examples.items.sort(key=lambda item: len(item["input_ids"]))
        return list(iterate_batches(examples, self.collator, EVAL_BATCH))

    def evaluate(self, on: Sequence[dict[str, Tensor]]) -> dict[str, float | None]:
        found = evaluation.evaluate(self.model, on, self.task.loss_fn, self.task.metrics)
        return {"loss": found["loss"] if math.isfinite(found["loss"]) else None, "accuracy": found.get("accuracy")}

    def stream(self, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Whole batches, epoch after epoch, in an order that depends on the seed alone."""
        draw = random.Random(seed)
        while True:
            order = draw.sample(range(len(self.train)), len(self.train))
            for first in range(0, len(order) - batch_size + 1, batch_size):
                yield self.collator([self.train[i] for i in order[first : first + batch_size]])

    def make(self, run: Run) -> dict[str, Any]:
        """Tune from the start; returns the run's line."""
        method = find(run.method)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                parameter.copy_(self.start[key])
        batches = self.stream(run.batch_size, run.seed)
        stepper = self._stepper(run, method, batches)
        curve = [{"forwards": 0.0, "seconds": 0.0, **self.untuned}]
        marks = sorted({*(mark for mark in MARKS if mark < run.forwards), run.forwards})
        seconds, first = 0.0, True
        while marks:
            began = time.perf_counter()
            stepper.step(next(batches))
            seconds += 0.0 if first else time.perf_counter() - began
            first = False
            if stepper.forwards >= marks[0]:
                marks = [mark for mark in marks if mark > stepper.forwards]
                found = self.evaluate(self.dev)
                curve.append({"forwards": round(stepper.forwards, 2), "seconds": round(seconds, 2), **found})
                if found["loss"] is None or found["loss"] > 4 * float(self.untuned["loss"] or 1.0):
                    break  # it has diverged
        return {**asdict(run), "curve": curve, "chosen_lr": stepper.lr, "test": self.evaluate(self.test)}

    def _stepper(self, run: Run, method: Method, batches: Iterator[dict[str, Tensor]]) -> Stepper:
        if method.rule is None:
            zm, _ = self._wrap("zo_sgd", {})
            assert run.lr is not None
            moving, depth = self._moving(method, zm)
            return Backpropagation(zm, moving, lr=run.lr, depth=depth)
        zm, state = self._wrap(method.rule, method.wrap)
        # The state is of a wrapped model whose η is open; what is given here is set first.
        zm.load_state_dict({**state, "seed": run.seed, "lr": 1.0 if run.lr is None else run.lr})
        return ForwardOnly(zm, run.lr, batches, run.forwards if method.falls else None)

    def _wrap(self, rule: str, options: dict[str, Any]) -> tuple[zowrap.ZOModel, dict[str, Any]]:
        key = json.dumps([rule, options])
        if key not in self._wrapped:
            given = {"trainable": self.trainable, "loss_fn": self.task.loss_fn, "engine": self.engine, **options}
            zm = zowrap.zo_wrap(self.model, rule, **given)
            self._wrapped[key] = zm, zm.state_dict()
        return self._wrapped[key]

    def _moving(self, method: Method, zm: zowrap.ZOModel) -> tuple[list[nn.Parameter], float]:
        """What moves by backpropagation, and the share of the layers that it goes through."""
        named = dict(self.model.named_parameters())
        names = {name for parameter in zm.parameters for name in parameter.names if name in named}
        modules = [name for name, _ in self.model.named_modules()]
        layers = [name for name in modules if name in layer_names(modules)]
        depth = 1.0
        if method.moves == "last":
            names, depth = {name for name in names if name.startswith(layers[-1] + ".")}, 1 / len(layers)
        if method.moves == "writers":
            credit, _ = self._wrap("meazo", {"estimator": "residual"})
            credit.accumulate(**self.collator([self.train[i] for i in range(BATCH)]))
            indices = credit.accumulator.credit.parameters
            names = {name for i in indices for name in credit.parameters[i].names if name in named}
            credit.discard()
        return [named[name] for name in named if name in names], depth


def _read(task: Task, data_dir: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows to train on, to choose by and to report on."""
    train = _texts(task, rows_of(data_dir, f"{task.data}/train.jsonl"))
    last = data_dir / task.data / "test.jsonl"
    test = _texts(task, rows_of(data_dir, f"{task.data}/{'test' if last.is_file() else 'dev'}.jsonl"))
    shuffled = random.Random(0).sample(train, len(train))
    return shuffled[task.dev_rows :], shuffled[: task.dev_rows], sample(test, task.test_rows)


def _texts(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Rows with a column ``text``, and where there are classes one for the ``label``."""
    found = []
    for row in rows:
        values = {"text": task.text.format(**row.values)}
        if task.kind != "lm":
            label = str(row.values["label"])
            values["label"] = task.words.get(label, label)
        found.append(replace(row, values=values))
    return found
