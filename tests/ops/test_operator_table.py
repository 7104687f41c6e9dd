"""The table of operators: each operator declares its traits and cost where it is defined, and no other list exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from operator import getitem
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op
from zowrap.analysis import html, operators
from zowrap.compiler.program import Input, Program
from zowrap.custom_op import OPERATORS, Cost, Traits, operator
from zowrap.errors import ZOInternalError
from zowrap.passes.epilogue import written_weights
from zowrap.passes.graph import tunable_values

ROOT = Path(__file__).parents[2]
HOME = "zowrap/ops/"  # the room that defines them


def test_every_operator_of_the_namespace_is_in_the_table() -> None:
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if _is_ours(name)}
    assert names == OPERATORS.keys() and len(names) >= 18
    assert all(custom_op.find(made.overload) is made for made in OPERATORS.values())


def _is_ours(name: str) -> bool:
    return name.startswith("zowrap::") and not name.startswith("zowrap::test_")


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_fake(name: str) -> None:
    made = OPERATORS[name]
    assert made.fake is not None
    assert torch._library.simple_registry.singleton.find(made.qualified).fake_impl.kernel is not None


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_traits_agree_with_the_schema(name: str) -> None:
    """Exactly the arguments declared as written are mutable, and results for all points are a list."""
    made = OPERATORS[name]
    schema = made.overload._schema
    mutable = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    assert [each.name for each in schema.arguments] == made.argument_names
    assert mutable == ([] if made.traits.writes is None else [made.traits.writes, "slots"])
    listed = [str(each.type) for each in schema.returns] == ["List[Tensor]"]
    assert listed or not (made.traits.all_points or made.traits.perturbs)
    if made.traits.plain_form is not None:
        other = made.traits.plain_form._schema
        assert [str(each.type) for each in other.arguments][: len(schema.arguments)] == [
            str(each.type) for each in schema.arguments
        ]


def test_costs_are_of_one_call() -> None:
    """Compare costs with numbers counted by hand."""
    x, w, points = torch.empty(2, 5, 3), torch.empty(7, 3), torch.zeros(2)
    arguments = {"x": [x], "w": w, "coefficients": points, "transposed": False, "result": [torch.empty(2, 5, 7)] * 2}
    product = OPERATORS["perturb_linear"]
    assert product.flops(arguments) == 2 * (2 * 3 * 7 * 10)  # both points: a product and a sum for each of 10 rows
    assert product.noise(arguments) == 21 and product.scratch(arguments) == 0
    assert product.buffers(arguments) == {("weights", torch.float32, 2): 2 * 21 * 4}
    labels = torch.zeros(2, 4, dtype=torch.int64)
    head = {"x": torch.empty(2, 4, 3), "w": w, "bias": None, "thin": torch.empty(2, 4, 2), "labels": labels}
    assert OPERATORS["head"].flops(head) == 2 * 8 * 7 * (3 + 2)
    assert OPERATORS["head"].buffers(head) == {("logits", torch.float32, 1): 7 * 8 * 4}
    assert OPERATORS["update_"].noise({"w": w, "keys": [None] * 3}) == 3 * 21
    assert OPERATORS["rows"].noise({}) == 0 and OPERATORS["rows"].buffers({}) == {}


# --- a new operator ------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the table by a copy, which is discarded with everything a test adds to it."""
    monkeypatch.setattr(custom_op, "OPERATORS", {**custom_op.OPERATORS})
    monkeypatch.setattr(custom_op, "_by_target", {**custom_op._by_target})


@pytest.mark.usefixtures("table")
def test_a_new_operator_is_known_to_passes_and_analysis() -> None:
    @operator(
        "test_perturb",
        traits=Traits(perturbs="matrix", all_points=True, looks_up=True),
        cost=Cost(
            flops=lambda matrix, result: len(result) * matrix.numel(),
            noise=lambda matrix: 3 * matrix.numel(),
            scratch=lambda count: count,
            buffers=lambda matrix: {("test", matrix.dtype, 1): 5},
        ),
    )
    def perturb(count: int, matrix: Tensor) -> list[Tensor]:
        """Return copies of a matrix."""
        return [matrix.clone() for _ in range(count)]

    @perturb.register_fake
    def _(count, matrix):
        return [torch.empty_like(matrix) for _ in range(count)]

    graph = fx.Graph()
    matrix = graph.placeholder("matrix")
    node = graph.call_function(perturb.overload, (2, matrix))
    values = [graph.call_function(getitem, (node, p)) for p in range(2)]
    graph.output(tuple(values))
    assert tunable_values(graph) == values and written_weights(graph) == []
    inputs = [Input("matrix", "parameter", "matrix")]
    program = Program(fx.GraphModule(torch.nn.Module(), graph), inputs, {}, FakeTensorMode(), points=2)
    kinds = html.points_of(program)
    copied = {n.name: n for n in program.graph.nodes}
    assert kinds[copied[node.name]] == html.ALL and [kinds[copied[v.name]] for v in values] == ["s0", "s1"]
    assert operators.is_called(perturb.overload) and operators.looks_up(perturb.overload)
    w = torch.empty(4, 3)
    cost = operators.operator_cost(node, (2, w), {}, [w, w], counted=0)
    assert cost == (2 * 12, 3 * 12, 2, {("test", torch.float32, 1): 5})


@pytest.mark.usefixtures("table")
def test_a_new_operator_that_writes_is_one_of_the_epilogue() -> None:
    @operator("test_write_", traits=Traits(writes="matrix"), cost=Cost(), mutates=("matrix",))
    def write(factor: float, matrix: Tensor) -> None:
        """Write in place."""
        matrix.mul_(factor)

    graph = fx.Graph()
    matrix = graph.placeholder("matrix")
    graph.call_function(write.overload, (2.0, matrix))
    graph.output(())
    assert written_weights(graph) == [matrix]


@pytest.mark.parametrize(
    ("traits", "cost"),
    [
        (Traits(perturbs="weight"), Cost()),
        (Traits(writes="weight"), Cost()),
        (Traits(), Cost(noise=lambda weight: 0)),
        (Traits(), Cost(scratch=lambda w, weight: 0)),
    ],
)
def test_names_that_the_operator_does_not_have_are_refused(traits: Traits, cost: Cost) -> None:
    def function(w: Tensor) -> Tensor:
        return w.clone()

    with pytest.raises(ZOInternalError, match="zowrap::test_wrong name weight, which it does not take"):
        operator("test_wrong", traits=traits, cost=cost)(function)
    assert "test_wrong" not in OPERATORS


# --- no other lists ------------------------------------------------------------------------------------------------


def lists_of_operators(source: str) -> Iterator[int]:
    """Yield lines of displays (sets, lists, tuples, keys or values of dictionaries) that name two or more operators."""
    tree = ast.parse(source)
    aliases = {"torch.ops.zowrap"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target, value in _pairs(node):
                if ast.unparse(value) in aliases:
                    aliases.add(ast.unparse(target))
    for node in ast.walk(tree):
        groups: list[list[ast.expr | None]] = []
        if isinstance(node, ast.Set | ast.List | ast.Tuple):
            groups = [list(node.elts)]
        elif isinstance(node, ast.Dict):
            groups = [list(node.keys), list(node.values)]
        for group in groups:
            if sum(_names_an_operator(each, aliases) for each in group) > 1 and not _is_assigned_apart(node, tree):
                yield node.lineno


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _is_assigned_apart(node: ast.AST, tree: ast.AST) -> bool:
    """Return whether a tuple is the right side of ``a, b = x, y``, which is no list of operators."""
    assigns = (each for each in ast.walk(tree) if isinstance(each, ast.Assign) and each.value is node)
    return any(isinstance(target, ast.Tuple) for each in assigns for target in each.targets)


def _names_an_operator(node: ast.expr | None, aliases: set[str]) -> bool:
    text = "" if node is None else ast.unparse(node)
    return any(
        text in (f"{alias}.{name}", f"{alias}.{name}.default") or text == repr(f"zowrap::{name}")
        for alias in aliases
        for name in OPERATORS
    )


def test_lists_are_found() -> None:
    source = "a, ours = torch.ops.aten, torch.ops.zowrap\nS = {\n  ours.head.default,\n  ours.rows.default,\n}\n"
    assert list(lists_of_operators(source)) == [2]
    assert list(lists_of_operators("D = {torch.ops.zowrap.cat: 1, torch.ops.zowrap.gather: 2}")) == [1]
    assert list(lists_of_operators("D = {1: torch.ops.zowrap.cat, 2: torch.ops.zowrap.gather}")) == [1]
    assert list(lists_of_operators("N = ['zowrap::head', 'zowrap::rows']")) == [1]
    assert list(lists_of_operators("x in (torch.ops.zowrap.head.default, torch.ops.aten.mm.default)")) == []
    assert list(lists_of_operators("a, b = torch.ops.zowrap.head, torch.ops.zowrap.rows")) == []


def test_nothing_else_keeps_a_list_of_operators() -> None:
    paths = [path for folder in ("zowrap", "passes", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        if not str(path.relative_to(ROOT)).startswith(HOME)
        for line in lists_of_operators(path.read_text(encoding="utf-8"))
    }
    assert len(paths) > 100 and found == set()
