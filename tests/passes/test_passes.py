"""Each pass: what it promises about the graph. (That it keeps the numbers is held family by family in test_capture.)"""

from __future__ import annotations

import pytest
import torch

import zowrap
from tests.support.families import batch, make
from zowrap.compiler import program as program_module
from zowrap.compiler.capture import canonical_batch, capture
from zowrap.compiler.program import verify
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.manager import Pass, run
from zowrap.passes.perturb import Perturb
from zowrap.passes.select_tunable import SelectTunable
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining

zo = torch.ops.zowrap


@pytest.fixture(autouse=True)
def check_shapes(monkeypatch):
    """Shapes are recomputed after every pass: one that does not fit together fails at once."""
    monkeypatch.setattr(program_module, "CHECK_SHAPES", True)


@pytest.fixture
def wrapped():
    return zowrap.zo_wrap(make("opt"), "zo_sgd", engine="compiled")


@pytest.fixture
def program(wrapped):
    return capture(wrapped.job.loss, canonical_batch(batch("opt", 4, 9), wrapped.model))


def count(program, target) -> int:
    return len(program.graph.find_nodes(op="call_function", target=target))


def select(wrapped, block=0):
    return SelectTunable(wrapped.job, block, wrapped.engine.kernels.key, 2, [])


def test_every_weight_is_perturbed_once_and_ties_once(wrapped, program) -> None:
    run(program, [StripTraining(), select(wrapped)])
    assert count(program, zo.perturb.default) == len(wrapped.parameters)


def test_untainted_nodes_stay_single(wrapped, program) -> None:
    run(program, [StripTraining(), select(wrapped)])
    tokens = count(program, torch.ops.aten.cumsum.default)
    attention = count(program, torch.ops.aten.scaled_dot_product_attention.default)
    run(program, [SplitStreams(2)])
    assert count(program, torch.ops.aten.cumsum.default) == tokens  # positions come from the mask alone
    assert count(program, torch.ops.aten.scaled_dot_product_attention.default) == 2 * attention


def test_below_the_active_block_everything_is_shared() -> None:
    wrapped = zowrap.zo_wrap(make("opt"), "zo_sgd", blocks="layer", engine="compiled")
    program = capture(wrapped.job.loss, canonical_batch(batch("opt", 4, 9), wrapped.model))
    run(program, [StripTraining(), CheckLookups(), select(wrapped, block=2), SplitStreams(2), Perturb()])
    assert count(program, torch.ops.aten.scaled_dot_product_attention.default) == 1 + 2
    assert count(program, zo.rows.default) == 2


def test_no_matrix_is_ever_perturbed_whole(wrapped, program) -> None:
    run(program, [StripTraining(), CheckLookups(), select(wrapped), SplitStreams(2), Perturb()])
    for node in program.graph.find_nodes(op="call_function", target=zo.perturb.default):
        assert node.args[0].meta["val"].ndim < 2
    assert count(program, zo.perturb_linear.default) == 13
    assert count(program, zo.perturb_rows.default) == 2
    assert count(program, torch.ops.aten.linear.default) == 0


def test_look_ups_are_checked_once_and_positions_not_at_all(wrapped, program) -> None:
    run(program, [StripTraining(), CheckLookups()])
    assert count(program, torch.ops.aten.index.Tensor) and not count(program, zo.index_error.default)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.randn(50, 4)) for _ in range(2))

        def forward(self, ids):
            return self.a[ids] + self.b[ids] + self.a[torch.arange(ids.shape[1])]

    wrapped = zowrap.zo_wrap(Twice(), loss_fn=lambda m, b: m(b["ids"]).mean((1, 2)), engine="compiled")
    program = capture(wrapped.job.loss, {"ids": torch.zeros(8, 48, dtype=torch.int64)})
    run(program, [StripTraining(), CheckLookups()])
    assert count(program, torch.ops.aten.index.Tensor) == 3
    assert count(program, zo.index_error.default) == 2  # the ids, and positions in a table that may be too short


def test_programs_print_and_run_after_every_pass(wrapped, program) -> None:
    run(program, [StripTraining(), CheckLookups(), select(wrapped), SplitStreams(2), Perturb()])
    names = [name for name, _ in program.history]
    assert names == ["capture", "strip_training", "check_lookups", "select_tunable", "split_streams", "perturb"]
    for _, text in program.history:
        compile(text, "program", "exec")
    assert "perturb_linear" in program.code()


def test_a_pass_that_breaks_the_program_is_named(wrapped, program) -> None:
    class Breaks(Pass):
        name = "breaks"

        def call(self, program):
            w = program.placeholder("parameter", "model.lm_head.weight")
            with program.graph.inserting_before(program.graph.output_node()):
                program.graph.call_function(torch.ops.aten.zero_.default, (w,))
            return "wrote"

    with pytest.raises(ZOInternalError, match=r"pass breaks \(after strip_training\).*only the epilogue may"):
        run(program, [StripTraining(), Breaks()])


def test_streams_need_perturbed_weights(program) -> None:
    with pytest.raises(ZOInternalError, match="pass split_streams"):
        run(program, [SplitStreams(2)])


def test_unused_parameters_alone_cannot_be_tuned(program) -> None:
    model = make("opt")
    model.extra = torch.nn.Parameter(torch.ones(3))
    wrapped = zowrap.zo_wrap(model, trainable=["extra"], engine="compiled")
    with pytest.raises(ZOCaptureError, match="takes part in the loss"):
        run(program, [StripTraining(), select(wrapped)])


def test_the_epilogue_writes_each_active_parameter_once(wrapped) -> None:
    graph = wrapped.engine._epilogues[0].graph_module.graph
    writes = graph.find_nodes(op="call_function", target=zo.update_.default)
    assert len(writes) == len(wrapped.parameters)
    assert len({n.args[0] for n in writes}) == len(writes)


def test_a_verified_program_writes_nothing(program) -> None:
    verify(program)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable
