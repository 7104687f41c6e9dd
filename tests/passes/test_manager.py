"""Passes run in order, the program is verified after each, and errors name the pass."""

from __future__ import annotations

import pytest
import torch

from tests.support.programs import TwoLayers, captured, numbers, wrap
from zowrap.compiler.program import Input, verify
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.passes.manager import Pass, run
from zowrap.passes.strip_training import StripTraining


@pytest.fixture
def program():
    return captured(wrap(TwoLayers()), numbers())


class Recorded(Pass):
    """Records the calls of its methods."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def requires(self, program) -> None:
        self.calls.append(f"{self.name} requires")

    def call(self, program) -> str:
        self.calls.append(f"{self.name} calls")
        return f"{self.name} did this"

    def ensures(self, program) -> None:
        self.calls.append(f"{self.name} ensures")


def test_passes_run_in_order_and_leave_a_text_and_a_note_each(program) -> None:
    calls: list[str] = []
    assert run(program, [Recorded("one", calls), Recorded("two", calls)]) is program
    assert calls == [f"{name} {part}" for name in ("one", "two") for part in ("requires", "calls", "ensures")]
    assert [name for name, _ in program.history] == ["capture", "one", "two"]
    for _, text in program.history:
        compile(text, "program", "exec")
    assert program.notes["two"].startswith("two did this (") and program.notes["two"].endswith(" ms)")
    assert "nodes after: capture → one → two" in program.code()


def test_no_passes_change_nothing(program) -> None:
    before = str(program.graph)
    run(program, [])
    assert str(program.graph) == before and len(program.history) == 1


def test_dead_code_goes_after_a_pass(program) -> None:
    class Adds(Pass):
        name = "adds"

        def call(self, program) -> str:
            (tanh,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
            with program.graph.inserting_after(tanh):
                program.graph.call_function(torch.ops.aten.cos.default, (tanh,))
            return "added what nobody reads"

    run(program, [Adds()])
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)


class Breaks(Pass):
    """Breaks the program in a way that no pass may."""

    name = "breaks"

    def __init__(self, how: str) -> None:
        self.how = how

    def requires(self, program) -> None:
        if self.how == "requires":
            raise ZOInternalError("it is not what the pass needs")

    def ensures(self, program) -> None:
        if self.how == "ensures":
            raise ZOInternalError("it is not what the pass promises")

    def call(self, program) -> str:
        graph = program.graph
        weight = program.placeholder("parameter", "model.a.weight")
        output = graph.output_node()
        if self.how == "writes":
            with graph.inserting_before(output):
                graph.call_function(torch.ops.aten.zero_.default, (weight,))
        elif self.how == "calls a module":
            with graph.inserting_before(output):
                node = graph.call_method("cos", (output.args[0][0],))
            output.args = ((node, output.args[0][1]),)
        elif self.how == "loses a loss":
            output.args = (output.args[0][:1],)
        elif self.how == "hides an input":
            with graph.inserting_after(weight):
                graph.placeholder("hidden").meta["val"] = weight.meta["val"]
        elif self.how == "names an input wrongly":
            program.inputs[0] = Input("other", "parameter", "model.a.weight")
        elif self.how == "misfits":
            (tanh,) = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
            tanh.replace_all_uses_with(weight)
        elif self.how == "fails":
            raise KeyError("what it looked for")
        return "broken"


BROKEN = {
    "requires": "it is not what the pass needs",
    "ensures": "it is not what the pass promises",
    "writes": "writes into a tensor: only the epilogue may",
    "calls a module": "calls back into Python modules",
    "loses a loss": "must return 1 losses and the weights",
    "hides an input": "placeholders and its list of inputs disagree",
    "names an input wrongly": "placeholders and its list of inputs disagree",
    "misfits": "",
    "fails": "what it looked for",
}


@pytest.mark.parametrize(("how", "sentence"), BROKEN.items(), ids=BROKEN)
def test_a_pass_that_breaks_the_program_is_named(program, how, sentence) -> None:
    with pytest.raises(ZOInternalError, match=rf"pass breaks \(after strip_training\) broke the program: .*{sentence}"):
        run(program, [StripTraining(), Breaks(how)])


def test_the_first_pass_is_named_as_the_first(program) -> None:
    with pytest.raises(ZOInternalError, match=r"pass breaks \(as the first pass\) broke the program"):
        run(program, [Breaks("fails")])


def test_a_model_that_cannot_be_handled_is_no_broken_program(program) -> None:
    class Refuses(Pass):
        name = "refuses"

        def call(self, program) -> str:
            raise ZOCaptureError("this model is too odd")

    with pytest.raises(ZOCaptureError, match=r"^this model is too odd$"):
        run(program, [StripTraining(), Refuses()])


def test_a_pass_without_a_rewrite_is_a_mistake(program) -> None:
    with pytest.raises(ZOInternalError, match=r"Pass\.call"):
        run(program, [Pass()])


def test_a_captured_program_is_verified(program) -> None:
    verify(program)
