"""The passes that build the program of a step run in order, and together they evaluate every point."""

from __future__ import annotations

import functools

import pytest
import torch

import zowrap
from tests.passes.test_epilogue import epilogue_of
from tests.passes.test_lower_quantized import inputs, quantized
from tests.support.families import batch, make
from tests.support.programs import (
    TwoLayers,
    captured,
    close,
    drawn,
    equal,
    evaluate,
    factor_directions,
    kernels_of,
    mean_square,
    moved_losses,
    noise_directions,
    numbers,
    operators,
    printed,
    wrap,
)
from zowrap.compiler.capture import canonical_batch
from zowrap.passes.build import build

FRONT = ["capture", "strip_training", "check_lookups", "fuse_head"]

CASES = {
    "noise": ({}, ["select_tunable", "split_streams", "perturb", "epilogue"]),
    "factors": ({"direction": "lowrank(2)"}, ["select_tunable", "split_streams", "perturb_lowrank", "epilogue"]),
    "population": (
        {"direction": "lowrank(2)", "estimator": "population"},
        ["select_tunable", "split_streams", "perturb_lowrank", "population", "epilogue"],
    ),
    "quantised": (
        {"quantized": "scales"},
        ["select_tunable", "split_streams", "perturb", "lower_quantized", "epilogue"],
    ),
}


@functools.cache
def built(case: str, points: int = 2):
    options, _ = CASES[case]
    zm = wrap(quantized() if "quantized" in options else TwoLayers(), **options)
    program = captured(zm, inputs() if "quantized" in options else numbers())
    arguments = (zm.job, 0, kernels_of(zm), points, [], epilogue_of(zm), case == "population")
    return zm, program, build(program.clone(), *arguments)


@pytest.mark.parametrize("case", CASES)
def test_the_passes_of_a_step_in_their_order(case) -> None:
    _, captured_program, program = built(case)
    assert [name for name, _ in program.history] == [*FRONT, *CASES[case][1]]
    assert list(program.notes) == [*FRONT[1:], *CASES[case][1]]
    assert program.points == 2 and program.epilogue is not None
    assert [name for name, _ in captured_program.history] == ["capture"], "what was captured serves the next block"


def test_the_plain_loss_takes_the_first_three_alone() -> None:
    zm, program, plain = built("noise", points=0)
    assert [name for name, _ in plain.history] == FRONT and plain.epilogue is None
    loss, weights = evaluate(plain, zm, numbers())
    assert torch.equal(loss, mean_square(zm.model, numbers()).detach()) and torch.equal(weights, torch.ones(5))
    assert equal([loss, weights], evaluate(program, zm, numbers()))


@pytest.mark.parametrize("case", ["noise", "factors"])
def test_every_point_is_the_loss_of_weights_moved_by_hand(case) -> None:
    zm, _, program = built(case)
    directions = noise_directions(zm) if case == "noise" else factor_directions(zm)
    for rows in (5, 2):
        *losses, weights = evaluate(program, zm, numbers(rows))
        assert close(losses, moved_losses(zm, numbers(rows), directions)) and torch.equal(weights, torch.ones(rows))


def test_every_example_of_a_population_has_a_direction_of_its_own() -> None:
    zm, _, program = built("population")
    factors = drawn("factors", (3, zm.job.layouts[0].size))
    *losses, _ = evaluate(program, zm, numbers(3), factors=factors)
    for b in range(3):
        one = {"x": numbers(3)["x"][b : b + 1]}
        assert close([loss[b : b + 1] for loss in losses], moved_losses(zm, one, factor_directions(zm, factors[b])))


def test_quantised_weights_are_multiplied_once_for_all_points() -> None:
    zm, _, program = built("quantised")
    assert operators(program)["zowrap.int8_points"] == 2 and operators(program)["zowrap.int8_linear"] == 0
    *losses, _ = evaluate(program, zm, inputs())
    assert close(losses, moved_losses(zm, inputs(), noise_directions(zm)))


def test_a_built_program_is_the_same_every_time() -> None:
    zm, program, one = built("noise")
    other = build(program.clone(), zm.job, 0, kernels_of(zm), 2, [], epilogue_of(zm))
    assert printed(other, zm) == printed(one, zm) and other.fingerprint() == one.fingerprint()


def test_no_matrix_of_a_transformer_is_perturbed_whole() -> None:
    zm = zowrap.zo_wrap(make("opt"), "zo_sgd", engine="compiled")
    program = captured(zm, canonical_batch(batch("opt", 4, 9), zm.model))
    found = operators(build(program, zm.job, 0, kernels_of(zm), 2, [], epilogue_of(zm)))
    assert (
        found["zowrap.perturb_linear"] == 12 and found["zowrap.perturb_rows"] == 2 and found["zowrap.perturb_head"] == 1
    )
    assert found["aten.linear"] == 0 and found["aten.scaled_dot_product_attention"] == 2 * 2
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default):
        assert node.args[0].meta["val"].ndim < 2
