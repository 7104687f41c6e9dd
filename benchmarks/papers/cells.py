"""Advance many small zeroth-order runs at once, with zowrap's own rules, noise and arithmetic, batched over *cells*.

The papers' toy experiments are millions of steps on functions of at most 10⁴ variables, where ``ZOModel.step`` would
spend its time in Python. A cell is one run (its own seed, learning rate and start); :class:`Cells` advances all of them
by one step in one call of :func:`torch.func.vmap`, compiled if asked. Nothing of a rule is written again here: a step
calls :mod:`zowrap.numerics.noise`, the estimator, :func:`zowrap.step.arithmetic.conclude`,
:func:`zowrap.step.arithmetic.update_leaf` and the rule in the order in which ``ZOModel`` does, and
``tests/benchmarks/test_cells.py`` compares each rule with ``zo_wrap(..., engine="eager")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from zowrap.errors import ZOError
from zowrap.numerics import noise
from zowrap.rules import Choice, Rule, estimators
from zowrap.rules.base import Scalars
from zowrap.step import blocks as block_lib
from zowrap.step import directions
from zowrap.step.arithmetic import conclude, perturb_weight, sum_slots, update_leaf

Objective = Callable[[Tensor, Scalars], Tensor]
"""``objective(x, data) -> 0-d``: x is float64 ``[d]``, ``data`` what :class:`Cells` was given, of one cell.

In float64, so that the order of summation cannot matter; the loss is then rounded to float32 as everywhere.
"""


def parameter_names(blocks: int) -> list[str]:
    """The names by which the blocks of x draw their noise, those of an ``nn.ParameterList`` called ``x``."""
    return [f"x.{i}" for i in range(blocks)]


class Cells:
    """Independent runs of one rule on one objective.

    Args:
        objective: see :data:`Objective`.
        rule: the rule of all cells.
        start: float32 ``[cells, d]``, θ at step 0.
        lr: η of each cell.
        seeds: noise seed of each cell.
        eps: perturbation size ε.
        direction, estimator, queries: as for ``zo_wrap``; None is the rule's own default.
        blocks: x is cut into this many blocks of equal size, one of which is perturbed and updated per step.
        block_order: see :data:`zowrap.names.BLOCK_ORDERS`; one for all cells or one for each.
        shared_state: all blocks feed one scalar state of the rule. ``zo_wrap`` keeps one per block; this is the
            variant that those are compared with.
        data: tensors ``[cells, ...]`` that the objective needs in addition to x.
        compiled: compile the step (tens of seconds once, then several times faster).

    Raises:
        ZOError: a rule, direction or estimator that needs more than probes along full directions.

    Attributes:
        theta: float32 ``[cells, d]``.
        step_count: steps done.
        skipped: int64 ``[cells]``, steps skipped because a loss or projected gradient was not finite.
    """

    def __init__(
        self,
        objective: Objective,
        rule: Rule,
        *,
        start: Tensor,
        lr: Sequence[float],
        seeds: Sequence[int],
        eps: float,
        direction: str | None = None,
        estimator: str | None = None,
        queries: int | None = None,
        blocks: int = 1,
        block_order: str | Sequence[str] = "ascending",
        shared_state: bool = False,
        data: Scalars | None = None,
        compiled: bool = False,
    ) -> None:
        count, size = start.shape
        self.rule = rule
        self.law = directions.get(direction or rule.defaults.direction)
        self.estimator = estimators.get_estimator(estimator or rule.defaults.estimator)
        self.queries = queries or rule.defaults.queries
        if rule.candidates or rule.refresh or rule.left or self.law.lowrank or self.estimator.per_example:
            raise ZOError(f"cells run rules of plain probes along full directions: {rule.name} needs more here")
        rule.check(Choice(self.law.name, self.estimator.name, self.queries, blocks))
        self.points = (rule.points or self.estimator.points)(self.queries)
        self.project = rule.project or self.estimator.project
        self.eps = eps
        self.blocks = blocks
        orders = [block_order] * count if isinstance(block_order, str) else block_order
        self._visits = list(zip(orders, seeds, strict=True))
        self.shared_state = shared_state
        self.step_count = 0
        self.seeds = list(seeds)
        self.data = data or {}
        self.skipped = torch.zeros(count, dtype=torch.int64)
        self._objective = objective
        self._ids = torch.tensor([noise.parameter_id(name) for name in parameter_names(blocks)])
        self._seed_tensor = torch.tensor(self.seeds, dtype=torch.int64)
        self._lr = torch.tensor(list(lr), dtype=torch.float32)
        self._theta = start.clone().float().reshape(count, blocks, size // blocks)
        shape = self._theta.shape
        self._slots = {name: torch.full(shape, slot.initial) for name, slot in rule.slots.items()}
        self._states = {name: torch.full((count, blocks), value) for name, value in rule.state.items()}
        noise.gaussian_table()  # made here, not while a compiler is tracing
        step = vmap(self._one_step, in_dims=(0, 0, 0, 0, 0, 0, None, 0))
        if compiled:
            torch.compiler.reset()  # Dynamo counts every Cells as a recompilation of the same vmap, and allows eight
        self._step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
        self._values = vmap(lambda theta, data: objective(theta.double().reshape(-1), data))

    @property
    def theta(self) -> Tensor:
        return self._theta.reshape(len(self.seeds), -1)

    @torch.no_grad()
    def values(self) -> Tensor:
        """float64 ``[cells]``: the objective at θ."""
        return self._values(self._theta, self.data)

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """``steps`` steps of every cell."""
        for _ in range(steps):
            step = torch.tensor(self.step_count)
            self._theta, self._slots, self._states, apply = self._step(
                self._theta, self._slots, self._states, self._lr, self._seed_tensor, self._active(), step, self.data
            )
            self.skipped += ~apply
            self.step_count += 1

    def trace(self, steps: int, every: int) -> Tensor:
        """float64 ``[1 + steps // every, cells]``: the objective now and after every ``every`` of ``steps`` steps."""
        rows = [self.values()]
        for _ in range(steps // every):
            self.advance(every)
            rows.append(self.values())
        return torch.stack(rows)

    def _active(self) -> Tensor:
        """int64 ``[cells]``: each cell's block of this step."""
        if self.blocks == 1:
            return torch.zeros(len(self.seeds), dtype=torch.int64)
        active = {
            (order, seed): block_lib.active(self.step_count, self.blocks, order, seed)
            for order, seed in set(self._visits)
        }
        return torch.tensor([active[visit] for visit in self._visits])

    def _one_step(
        self,
        theta: Tensor,
        slots: Scalars,
        states: Scalars,
        lr: Tensor,
        seed: Tensor,
        block: Tensor,
        step: Tensor,
        data: Scalars,
    ) -> tuple[Tensor, Scalars, Scalars, Tensor]:
        """One step of one cell: ``theta`` and slots ``[blocks, n]``, states ``[blocks]``, the rest 0-d."""
        rule = self.rule
        here = torch.arange(self.blocks) == block
        place = here if not self.shared_state else torch.arange(self.blocks) == 0
        w = _pick(theta, here)
        own_slots = {name: _pick(slot, here) for name, slot in slots.items()}
        state = {name: _pick(value, place) for name, value in states.items()}
        hyper = {"lr": lr, "eps": torch.tensor(self.eps), "weight_decay": torch.tensor(0.0)}

        scalars: Scalars = {}
        if rule.direction_scalars is not None:
            sums = sum_slots(rule.reduce, own_slots) if rule.reduce is not None else {}
            sums["count"] = torch.tensor(float(w.numel()), dtype=torch.float64)
            scalars = rule.direction_scalars(state, sums, hyper)
        block_id = _pick(self._ids, here).reshape(1)

        def direction(query: Tensor) -> Tensor:
            key = noise.derive_keys(seed, step, query, block_id, noise.TAG_DIRECTION)[0]
            u = noise.draw(self.law.law, key, w.shape)
            if self.law.scale is not None:
                squares = directions.integer_squares(u).sum()
                u = u * self.law.scale(directions.squared_norm(squares), w.numel())
            return rule.direction(u, w, {name: own_slots[name] for name in rule.direction_slots}, scalars)

        z = vmap(direction)(torch.arange(self.queries))

        def loss(coefficient: Tensor, index: Tensor) -> Tensor:
            moved = perturb_weight(w, z[index], coefficient * hyper["eps"])
            x = torch.where(here.unsqueeze(-1), moved, theta) if self.blocks > 1 else moved
            return self._objective(x.double().reshape(-1), data).float()

        signs = torch.tensor([point.coefficient for point in self.points])
        losses = vmap(loss)(signs, torch.tensor([point.direction for point in self.points]))
        done = conclude(rule, self.project, state, losses, hyper, step.float())
        new_w, new_slots = update_leaf(
            rule, w, list(z.unbind()), own_slots, done.coefficients, hyper, done.apply, None, False
        )
        return (
            _put(theta, here, new_w),
            {name: _put(slots[name], here, value) for name, value in new_slots.items()},
            {name: _put(states[name], place, value) for name, value in done.state.items()},
            done.apply,
        )


def _pick(stacked: Tensor, here: Tensor) -> Tensor:
    """The entry of ``stacked`` ``[blocks, ...]`` where ``here`` (bool ``[blocks]``, one True) is True."""
    if stacked.shape[0] == 1:
        return stacked[0]
    return stacked.index_select(0, here.long().argmax().reshape(1))[0]


def _put(stacked: Tensor, here: Tensor, value: Tensor) -> Tensor:
    """Replace the entry of ``stacked`` where ``here`` is True."""
    if stacked.shape[0] == 1:
        return value.unsqueeze(0)
    return torch.where(here.reshape(-1, *[1] * value.dim()), value.unsqueeze(0), stacked)
