"""A cell is a run of the product: the batched driver moves as ``zo_wrap(..., engine="eager")`` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zowrap
from benchmarks.papers import functions
from benchmarks.papers.cells import Cells, parameter_names
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.names import BLOCK_ORDERS

SIZE, STEPS, EPS = 120, 50, 1e-3
OBJECTIVE = functions.quadratic(torch.logspace(-2, 0, SIZE, dtype=torch.float64))
# The rules of E1 to E5, with the learning rates of two cells.
RULES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("zo_sgd", {}, [1e-3, 1e-2]),
    ("conmezo", {"theta": 1.3}, [1e-3, 1e-2]),
    ("meazo", {"beta": 0.9}, [1e-2, 1e-1]),
    ("zo_adam", {}, [1e-2, 1e-1]),
    ("zo_adamm", {"amsgrad": False}, [1e-2, 1e-1]),
    ("zo_rmsprop", {}, [1e-2, 1e-1]),
    ("radazo", {}, [1e-3, 1e-2]),
]
IDS = [name for name, *_ in RULES]
K_QUERIES = {"direction": "unit_sphere", "estimator": "forward", "queries": 10}


class Blocks(nn.Module):
    def __init__(self, start: torch.Tensor, blocks: int) -> None:
        super().__init__()
        self.x = nn.ParameterList([part.clone() for part in start.chunk(blocks)])


def product(start: torch.Tensor, rule: rules.Rule, blocks: int, **options: Any) -> torch.Tensor:
    """Where ``STEPS`` steps of the eager engine end."""
    model = Blocks(start, blocks)
    zm = zowrap.zo_wrap(
        model,
        rule,
        eps=EPS,
        engine="eager",
        blocks=parameter_names(blocks) if blocks > 1 else None,
        loss_fn=lambda m, b: OBJECTIVE(torch.cat(list(m.x)).double(), {}),
        **options,
    )
    for _ in range(STEPS):
        zm.step(unused=torch.ones(1))
    return torch.cat([part.detach() for part in model.x])


def compare(rule: rules.Rule, lrs: list[float], blocks: int = 1, compiled: bool = False, **options: Any) -> None:
    starts, seeds = functions.normal_starts([0, 1], SIZE), [0, 7]
    order = options.pop("block_order", "ascending")
    cells = Cells(
        OBJECTIVE,
        rule,
        start=starts,
        lr=lrs,
        seeds=seeds,
        eps=EPS,
        blocks=blocks,
        block_order=order,
        compiled=compiled,
        **options,
    )
    cells.advance(STEPS)
    for i, (start, lr, seed) in enumerate(zip(starts, lrs, seeds, strict=True)):
        end = product(start, rule, blocks, lr=lr, seed=seed, block_order=order, **options)
        displacement = (end - start).norm()
        assert displacement > 1e-3
        # Compiled code rounds otherwise on some processors, and 50 steps of a rule that divides by its state grow that.
        assert (cells.theta[i] - end).norm() <= (1e-3 if compiled else 1e-6) * displacement


@pytest.mark.parametrize(("name", "hyper", "lrs"), RULES, ids=IDS)
def test_a_cell_is_a_run_of_zo_wrap(name: str, hyper: dict[str, Any], lrs: list[float]) -> None:
    compare(rules.get(name, **hyper), lrs)


@pytest.mark.parametrize(("name", "hyper", "lrs"), [r for r in RULES if r[0] != "conmezo"], ids=lambda v: str(v)[:12])
def test_so_it_is_with_several_queries_on_the_unit_sphere(name: str, hyper: dict[str, Any], lrs: list[float]) -> None:
    compare(rules.get(name, **hyper), [10 * lr for lr in lrs], **K_QUERIES)


@pytest.mark.parametrize(("name", "order"), [*(("meazo", order) for order in BLOCK_ORDERS), ("conmezo", "ascending")])
def test_so_it_is_with_blocks_in_every_order(name: str, order: str) -> None:
    lrs = [1e-2, 1e-1] if name == "meazo" else [1e-3, 1e-2]
    compare(rules.get(name), lrs, blocks=4, block_order=order)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conmezo", "radazo"])
def test_so_it_is_compiled(name: str) -> None:
    compare(rules.get(name), [1e-3, 1e-2], compiled=True)


def test_orders_may_differ_between_cells() -> None:
    """Each cell of a mixed bank moves as in a bank of its own order."""
    starts = functions.normal_starts([0, 1], SIZE)
    common: dict[str, Any] = {"eps": EPS, "blocks": 4}
    rule = rules.get("zo_sgd")
    mixed = Cells(
        OBJECTIVE, rule, start=starts, lr=[1e-2] * 2, seeds=[3, 3], block_order=["random", "descending"], **common
    )
    mixed.advance(10)
    for i, order in enumerate(["random", "descending"]):
        alone = Cells(OBJECTIVE, rule, start=starts[i : i + 1], lr=[1e-2], seeds=[3], block_order=order, **common)
        alone.advance(10)
        assert torch.equal(alone.theta[0], mixed.theta[i])


def test_a_shared_scalar_hears_of_every_block() -> None:
    """With blocks of curvature 1 and 1000 the shared v makes the flat block's steps shorter than its own v does."""
    objective = functions.quadratic(torch.tensor([1.0, 1000.0], dtype=torch.float64).repeat_interleave(SIZE // 2))
    start = functions.normal_starts([0], SIZE)
    moved = []
    for shared in (False, True):
        cells = Cells(
            objective, rules.get("meazo"), start=start, lr=[1e-3], seeds=[0], eps=EPS, blocks=2, shared_state=shared
        )
        cells.advance(40)
        moved.append((cells.theta - start)[0, : SIZE // 2].norm())
    assert moved[1] < 0.5 * moved[0]


def test_a_loss_that_is_not_finite_is_counted_and_changes_nothing() -> None:
    cells = Cells(
        lambda x, data: x.sum() * data["factor"],
        rules.get("zo_sgd"),
        start=torch.ones(2, 8),
        lr=[1e-3] * 2,
        seeds=[0, 0],
        eps=EPS,
        data={"factor": torch.tensor([1.0, float("nan")])},
    )
    cells.advance(3)
    assert cells.skipped.tolist() == [0, 3]
    assert torch.equal(cells.theta[1], torch.ones(8)) and not torch.equal(cells.theta[0], torch.ones(8))


@pytest.mark.parametrize(
    ("objective", "at", "value"),
    [
        (functions.sphere, [1.0, 2.0], 2.5),
        (functions.cubic, [1.0, -2.0], 11.5),
        (functions.levy, [1.0, 1.0, 1.0], 0.0),
        (functions.rosenbrock, [1.0, 1.0, 1.0], 0.0),
        (functions.rosenbrock, [0.0, 1.0], 101.0),
    ],
)
def test_the_functions_have_their_known_values(objective: Any, at: list[float], value: float) -> None:
    assert objective(torch.tensor(at, dtype=torch.float64), {}).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "options"),
    [("lozo", {}), ("sparse_mezo", {}), ("zo_sgd", {"estimator": "population"})],
    ids=lambda v: str(v),
)
def test_what_cells_cannot_run_is_refused(rule: str, options: dict[str, Any]) -> None:
    with pytest.raises(ZOError, match=rule):
        Cells(OBJECTIVE, rules.get(rule), start=torch.ones(1, SIZE), lr=[1e-3], seeds=[0], eps=EPS, **options)
