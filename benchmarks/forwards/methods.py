"""The methods that are compared, and what a step of each costs in plain forwards of :data:`BATCH` examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import zowrap
from zowrap.calibration.credit_rate import CreditRate
from zowrap.errors import ZOError
from zowrap.model.zo_model import ZOModel

BATCH = 16  # of MeZO, and of a forward that is counted as one


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Attributes:
        rule, wrap: of ``zo_wrap``; without a rule it is backpropagation with plain gradient descent.
        lrs: where the search for η starts, half decades; empty where η is chosen without a search.
        batches: numbers of examples in a step that are tried.
        moves: of backpropagation, what moves: ``"all"`` that the task tunes, the matrices that ``"write"`` to the
            residual stream, or those of the ``"last"`` block.
        falls: η falls to 0 within the budget, as it does by default in runs with residual credit; else it is constant.
        budget: forwards of a run, as a share of the task's.
    """

    rule: str | None
    lrs: tuple[float, ...]
    wrap: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (BATCH,)
    moves: str = "all"
    falls: bool = False
    budget: float = 1.0


METHODS = {
    "MeZO": Method("zo_sgd", (1e-5, 3e-5, 1e-4), batches=(4, BATCH)),
    "MEAZO": Method("meazo", (3e-4, 1e-3, 3e-3)),
    "MeZO, late values": Method("zo_sgd", (3e-4, 1e-3, 3e-3), {"trainable": "late-values"}, batches=(4, BATCH)),
    "population": Method("zo_sgd", (3e-5, 1e-4, 3e-4), {"estimator": "population"}),
    "GRZO": Method("zo_sgd", (3e-5, 1e-4, 3e-4), {"estimator": "grzo"}),
    "residual": Method("meazo", (1e-4, 3e-4, 1e-3), {"estimator": "residual"}, falls=True),
    "residual, auto": Method("meazo", (), {"estimator": "residual"}, falls=True),
    "residual, auto, a tenth": Method("meazo", (), {"estimator": "residual"}, falls=True, budget=0.1),
    "backpropagation": Method(None, (1e-2, 3e-2, 1e-1)),
    "backpropagation, writers": Method(None, (1e-2, 3e-2, 1e-1), moves="writers"),
    "backpropagation, last block": Method(None, (1e-2, 3e-2, 1e-1), moves="last"),
}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        ZOError: there is none.
    """
    if name not in METHODS:
        raise ZOError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


class Stepper(Protocol):
    """Makes steps of a method on a model.

    Attributes:
        forwards: plain forwards of :data:`BATCH` examples that the steps so far have cost.
        lr: η; of a method that chooses it, once it has.
    """

    forwards: float
    lr: float | None

    def step(self, batch: dict[str, Tensor]) -> None:
        """Make one step on a batch."""


class ForwardOnly(Stepper):
    """Steps of ``zo_wrap``.

    Args:
        lr: η; None chooses it as ``--lr auto`` does.
        budget: forwards of the run, within which η falls to 0; None leaves it constant.
    """

    def __init__(
        self, zm: ZOModel, lr: float | None, batches: Iterator[dict[str, Tensor]], budget: float | None
    ) -> None:
        self.zm, self.forwards, self.budget = zm, 0.0, budget
        self._cost: float | None = None
        if lr is None:
            assert budget is not None
            ahead = [next(batches) for _ in range(4)]
            choice = zowrap.tune_lr(zm, ahead, steps=round(budget / 1.4))
            assert isinstance(choice, CreditRate)
            lr = choice.lr
            self.forwards = choice.forwards * self._cost_of_a_step()  # by the program that gives credit
        self.lr = lr

    def step(self, batch: dict[str, Tensor]) -> None:
        assert self.lr is not None
        if self.budget is not None:
            self.zm.lr = self.lr * max(1 - self.forwards / self.budget, 0.0)
        before = self.zm.descent.evaluations
        self.zm.step(**batch)
        if self._cost is None:
            self._cost = self._cost_of_a_step()
        self.forwards += self._cost * (1 + self.zm.descent.evaluations - before) * _share(batch)

    def _cost_of_a_step(self) -> float:
        """Plain forwards of the same batch, by operations where they are not a whole number."""
        if not self.zm.job.estimator.credit:
            return float(len(self.zm.points))
        costs = self.zm.inspect().costs
        return 1.4 if costs is None else 2 * costs.step.flops / costs.forwards.flops


class Backpropagation(Stepper):
    """Gradient descent; a backward pass costs two forwards, less where only later layers need one.

    Args:
        loss: ``loss(model, batch)``.
        parameters: what moves.
        depth: share of the layers that the backward pass goes through.
    """

    def __init__(self, zm: ZOModel, parameters: list[nn.Parameter], *, lr: float, depth: float) -> None:
        self.loss, self.parameters, self.lr, self.depth = zm.loss_module, parameters, lr, depth
        self.forwards = 0.0

    def step(self, batch: dict[str, Tensor]) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            sums, weights = self.loss(batch)
            gradients = torch.autograd.grad(sums.sum() / weights.sum(), self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.requires_grad_(False)
            assert self.lr is not None
            parameter.data.sub_(self.lr * gradient)
        self.forwards += (1 + 2 * self.depth) * _share(batch)


def _share(batch: dict[str, Tensor]) -> float:
    return next(iter(batch.values())).shape[0] / BATCH
