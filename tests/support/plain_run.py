"""A run without a Trainer: a small model, where its run begins, and the writer of its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zowrap
from zowrap.loss.evaluation import Evaluation
from zowrap.training.config import ZOConfig
from zowrap.training.loop import make_first_state
from zowrap.training.resume import Start, find_start
from zowrap.training.run_folder import Run
from zowrap.training.weight_check import WeightCheck
from zowrap.training.writer import RunWriter


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(-1)


def make_batch(step: int, factor: float = 1.0) -> dict[str, Tensor]:
    """Three rows; with the factor NaN, their loss is not finite."""
    draw = torch.Generator().manual_seed(step)
    return {"x": factor * torch.randn(3, 4, generator=draw), "y": torch.ones(3, 1)}


class PlainRun:
    """One start of a run of eight steps, up to the point where a training loop would begin.

    Args:
        folder: of the run.
        resume: as :func:`zowrap.training.resume.find_start` takes it.
        model: moves; by default a linear layer.
        base_model: its name.
        check_labels: as the writer takes it.
        options: of ``ZOConfig``.

    Attributes:
        wrapped: the (steps, engine) that the model was wrapped for, in order.
    """

    def __init__(
        self,
        folder: Path,
        resume: str | bool | None = None,
        model: nn.Module | None = None,
        base_model: str | None = None,
        check_labels: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1) if model is None else model
        defaults = {"max_steps": 8, "learning_rate": 1e-2, "report_to": "none", "save_steps": 2, "engine": "eager"}
        self.args = ZOConfig(output_dir=str(folder), **{**defaults, **options})
        self.run = Run(folder)
        self.wrapped: list[tuple[int, str | None]] = []
        weights = WeightCheck(self.wrap(0, None).parameters)
        self.wrapped.clear()
        first = make_first_state(self.args, lambda: range(10))
        self.start: Start = find_start(self.run, self.args, self.wrap, first, resume, base_model)
        self.state = self.start.state
        self.writer = RunWriter(
            self.run,
            self.zm,
            self.start,
            self.args,
            config={"model": base_model, "options": {"rule": self.args.rule}},
            weights=weights,
            facts={"base_model": "toy"},
            check_labels=check_labels,
        )
        self.writer.open()

    def wrap(self, steps: int, engine: str | None) -> zowrap.ZOModel:
        self.wrapped.append((steps, engine))
        self.zm = zowrap.zo_wrap(
            self.model, self.args.rule_object(), lr=self.args.learning_rate, seed=self.args.seed, loss_fn=loss_of,
            engine=engine or self.args.engine or "eager",
        )  # fmt: skip
        return self.zm

    def make_steps(self, count: int, broken: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Make steps, of which those in ``broken`` (counted from 1 over the run) have no finite loss."""
        for _ in range(count):
            step = self.zm.step_count
            result = self.zm.step(**make_batch(step, float("nan") if step + 1 in broken else 1.0))
            self.state.global_step = self.zm.step_count
            self.writer.add_step(result)

    def evaluate(self, loss: float | list[float], prefix: str = "eval", **metrics: float) -> None:
        """Add an evaluation with this loss, of all rows or of each."""
        sums = Evaluation()
        losses = torch.tensor(loss if isinstance(loss, list) else [loss])
        sums.examples = len(losses)
        sums.add_loss(losses, torch.ones_like(losses), len(losses), torch.device("cpu"))
        named = {f"{prefix}_{name}": value for name, value in {"loss": float(losses.mean()), **metrics}.items()}
        self.writer.add_evaluation(named, self.zm.step_count, sums, prefix)

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        self.writer.save_checkpoint(dataclasses.asdict(self.state))
