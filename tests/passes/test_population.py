"""Each example gets its own direction, and each product with a weight stays one product for the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.test_perturb import TWO_LAYERS, Words
from tests.passes.test_perturb_lowrank import AFTER as LOW_RANK
from tests.passes.test_perturb_lowrank import TwoMatrices
from tests.support.programs import (
    TwoLayers,
    after,
    captured,
    change,
    close,
    drawn,
    evaluate,
    factor_directions,
    mean_square,
    moved_losses,
    numbers,
    operators,
    printed,
    select,
    tokens,
    wrap,
)
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.loss.module import Batch, LossFn, token_losses
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.fuse_head import FuseHead
from zowrap.passes.perturb_lowrank import PerturbLowRank
from zowrap.passes.population import Population
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

BEFORE = LOW_RANK  # the program after the pass for low-rank directions

AFTER = """
def forward(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1):
    sym_size_int = aten.sym_size.int(arg2_1, 0)
    unsqueeze = aten.unsqueeze(arg2_1, 1)
    slice_1 = aten.slice.Tensor(arg3_1, 1, 64, 66)
    view = aten.view(slice_1, [sym_size_int, 2, 1])
    slice_2 = aten.slice.Tensor(arg3_1, 1, 96, 100)
    view_1 = aten.view(slice_2, [sym_size_int, 4, 1])
    slice_3 = aten.slice.Tensor(arg3_1, 1, 0, 4)
    view_2 = aten.view(slice_3, [sym_size_int, 4, 1])
    slice_4 = aten.slice.Tensor(arg3_1, 1, 32, 35)
    view_3 = aten.view(slice_4, [sym_size_int, 3, 1])
    select = aten.select.int(arg4_1, 0, 0)
    t = aten.t(arg0_1)
    view_4 = aten.view(unsqueeze, [sym_size_int, 3])
    mm = aten.mm(view_4, t)
    _unsafe_view = aten._unsafe_view(mm, [sym_size_int, 1, 4])
    expand = aten.expand(unsqueeze, [sym_size_int, 1, 3])
    view_5 = aten.view(expand, [sym_size_int, 1, 3])
    expand_1 = aten.expand(view_3, [sym_size_int, 3, 1])
    view_6 = aten.view(expand_1, [sym_size_int, 3, 1])
    bmm = aten.bmm(view_5, view_6)
    _unsafe_view_1 = aten._unsafe_view(bmm, [sym_size_int, 1, 1])
    slice_5 = aten.slice.Tensor(_unsafe_view_1, 2, 0, 1)
    select_1 = aten.select.int(view_2, 2, 0)
    view_7 = aten.view(select_1, [sym_size_int, 1, 4])
    mul_7 = aten.mul.Tensor(slice_5, view_7)
    mul_8 = aten.mul.Tensor(mul_7, select)
    add = aten.add.Tensor(_unsafe_view, mul_8)
    tanh = aten.tanh(add)
    select_2 = aten.select.int(arg4_1, 0, 0)
    t_1 = aten.t(arg1_1)
    view_8 = aten.view(tanh, [sym_size_int, 4])
    mm_1 = aten.mm(view_8, t_1)
    _unsafe_view_2 = aten._unsafe_view(mm_1, [sym_size_int, 1, 2])
    expand_2 = aten.expand(tanh, [sym_size_int, 1, 4])
    view_9 = aten.view(expand_2, [sym_size_int, 1, 4])
    expand_3 = aten.expand(view_1, [sym_size_int, 4, 1])
    view_10 = aten.view(expand_3, [sym_size_int, 4, 1])
    bmm_1 = aten.bmm(view_9, view_10)
    _unsafe_view_3 = aten._unsafe_view(bmm_1, [sym_size_int, 1, 1])
    slice_6 = aten.slice.Tensor(_unsafe_view_3, 2, 0, 1)
    select_3 = aten.select.int(view, 2, 0)
    view_11 = aten.view(select_3, [sym_size_int, 1, 2])
    mul_16 = aten.mul.Tensor(slice_6, view_11)
    mul_17 = aten.mul.Tensor(mul_16, select_2)
    add_1 = aten.add.Tensor(_unsafe_view_2, mul_17)
    pow_1 = aten.pow.Tensor_Scalar(add_1, 2)
    mean = aten.mean.dim(pow_1, [2])
    ones_like = aten.ones_like(mean, pin_memory = False)
    view_12 = aten.view(mean, [sym_size_int])
    view_13 = aten.view(ones_like, [sym_size_int])
    return (view_12, view_13)
"""


@functools.cache
def prepared(
    model: nn.Module,
    batch: Callable[[], Batch] = numbers,
    loss_fn: LossFn = mean_square,
    points: int = 2,
    rank: int = 2,
):
    zm = wrap(model, loss_fn, direction=f"lowrank({rank})", estimator="population")
    front = (StripTraining(), CheckLookups(), FuseHead())
    return zm, captured(zm, batch(), *front, select(zm, points), SplitStreams(points), PerturbLowRank())


@functools.cache
def mapped_of(model: nn.Module, batch: Callable[[], Batch] = numbers, loss_fn: LossFn = mean_square):
    """Return the wrapped model and its programs before and after the pass."""
    zm, program = prepared(model, batch, loss_fn)
    return zm, program, after(program, Population())


def factors_of(zm, examples: int) -> Tensor:
    (layout,) = zm.job.layouts
    return drawn("factors", (examples, layout.size))


TWO_MATRICES = TwoMatrices()


def test_the_text_of_two_layers() -> None:
    zm, program = prepared(TWO_MATRICES, points=1, rank=1)
    assert printed(program, zm) == BEFORE.strip()
    assert printed(after(program, Population()), zm) == AFTER.strip()


def test_a_product_with_a_weight_is_one_for_the_batch_and_one_with_factors_is_one_each() -> None:
    _, program = prepared(TWO_MATRICES, points=1, rank=1)
    difference = change(operators(program), operators(after(program, Population())))
    assert difference["aten.linear"] == -2 and difference["aten.mm"] == 2
    assert difference["aten.matmul"] == -2 and difference["aten.bmm"] == 2


def test_factors_and_what_has_rows_are_per_example() -> None:
    _, program, mapped = mapped_of(TWO_LAYERS)
    assert mapped.notes["population"].startswith("1 inputs per example")
    assert [(each.kind, each.target) for each in mapped.inputs] == [(e.kind, e.target) for e in program.inputs]
    shapes = {each.target: fake.shape for each, fake in zip(mapped.inputs, mapped.fakes(), strict=True)}
    assert len(shapes["factors"]) == 2 and str(shapes["factors"][0]) == str(shapes["x"][0])
    assert len(shapes["coefficients"]) == 1 and shapes["model.a.weight"] == (4, 3)


class Normed(nn.Module):
    """A model of all operations with a special form under vmap: norm, attention, concatenation, gather, class loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).view(-1, 1, 2, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y).reshape(-1, 4)
        y = torch.cat((y[:, :2], y[:, :2].cumsum(1)), 1)
        return self.b(y + y.gather(1, (y > 0).long()))


def classes(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def classified(rows: int = 5) -> dict[str, Tensor]:
    return {**numbers(rows), "labels": torch.arange(rows) % 3}


def next_tokens(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    sums, counts = token_losses(model(batch["ids"])[:, :-1], batch["labels"][:, 1:])
    return sums / counts


CASES = {
    "two layers": (TWO_LAYERS, numbers, mean_square),
    "words": (Words(), tokens, next_tokens),
    "norm, attention, gather, classes": (Normed(), classified, classes),
}
by_case = pytest.mark.parametrize(("model", "batch", "loss_fn"), CASES.values(), ids=CASES)


@by_case
def test_each_example_is_evaluated_along_its_own_factors(model, batch, loss_fn) -> None:
    zm, _, mapped = mapped_of(model, batch, loss_fn)
    for rows in (5, 3, 1):
        given, factors = batch(rows), factors_of(zm, rows)
        *losses, weights = evaluate(mapped, zm, given, factors=factors)
        for b in range(rows):
            one = {name: value[b : b + 1] for name, value in given.items()}
            assert close([loss[b : b + 1] for loss in losses], moved_losses(zm, one, factor_directions(zm, factors[b])))
        assert torch.equal(weights, torch.ones(rows))


@by_case
def test_with_equal_factors_it_is_the_program_before(model, batch, loss_fn) -> None:
    zm, program, mapped = mapped_of(model, batch, loss_fn)
    (factors,) = factors_of(zm, 1)
    expected = evaluate(program, zm, batch(), factors=factors)
    assert close(evaluate(mapped, zm, batch(), factors=factors.expand(5, -1)), expected)


def test_a_tensor_of_one_row_is_shared_by_all_examples() -> None:
    def shifted(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return (model(batch["x"]) + batch["shift"]).square().mean(-1)

    def batch(rows: int = 5) -> dict[str, Tensor]:
        return {**numbers(rows), "shift": torch.full((1, 2), 0.5)}

    zm, program = prepared(TWO_LAYERS, batch, shifted)
    mapped, factors = after(program, Population()), factors_of(zm, 3)
    assert mapped.notes["population"].startswith("1 inputs per example")
    *losses, _ = evaluate(mapped, zm, batch(3), factors=factors)
    one = {"x": numbers(3)["x"][1:2], "shift": batch()["shift"]}
    assert close([loss[1:2] for loss in losses], moved_losses(zm, one, factor_directions(zm, factors[1])))


def test_full_rank_directions_are_refused() -> None:
    zm = wrap(TwoLayers())
    program = captured(zm, numbers(), StripTraining(), select(zm), SplitStreams(2))
    with pytest.raises(ZOInternalError, match="only low-rank directions can differ between the examples of a batch"):
        after(program, Population())


def test_a_second_time_is_refused() -> None:
    """After one run the factors already have a row for each example."""
    _, program = prepared(TWO_LAYERS)
    with pytest.raises(ZOCaptureError, match="cannot give each example a direction of its own"):
        after(program, Population(), Population())


class Branching(TwoLayers):
    """A model that branches on the number of rows, and is captured for that number only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[0] == 5 else -x)


class Joined(TwoLayers):
    """A model that needs five rows at once."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(5, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [(Branching(), "would fix the size of its batches"), (Joined(), "cannot give each example a direction of its own")],
    ids=["branching", "joined"],
)
def test_a_model_that_no_single_example_fits_is_refused(model, message) -> None:
    _, program = prepared(model)
    with pytest.raises(ZOCaptureError, match=message):
        after(program, Population())
