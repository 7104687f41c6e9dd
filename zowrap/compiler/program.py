"""Define programs: functional fx graphs whose inputs are all named.

A program starts as the captured loss and ends as the perturbed evaluations of a step; each pass turns one program into
another. Programs print as Python, headed by the passes that made them, and can be run uncompiled (``program(inputs)``),
so that tests compare every pass with the one before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from zowrap.compiler.guards import Guards
from zowrap.compiler.inductor import symbolic_sizes
from zowrap.errors import ZOInternalError
from zowrap.step.credit import Use

# Recompute all shapes after every pass, as the tests do: it detects a broken pass at once, but takes seconds.
CHECK_SHAPES = False


@dataclass(frozen=True)
class Input:
    """One placeholder.

    Attributes:
        node: the placeholder's name in the graph.
        kind: ``"parameter"``, ``"buffer"``, ``"constant"``, ``"batch"``, or ``"added"`` for the inputs that passes add
            (keys, scale, coefficients, rule state).
        target: state-dict name in the loss module, key of the batch, or name of the added input.
    """

    node: str
    kind: str
    target: str


@dataclass
class Program:
    """A functional graph of tensors with named inputs.

    Attributes:
        graph_module: placeholders in the order of ``inputs``; output ``(sums_0, …, sums_{points-1}, weights)``,
            followed by what residual credit adds.
        constants: tensors lifted out of the model's code, by target.
        fake_mode: holds the symbolic sizes.
        points: the number of evaluations in the program.
        history: ``(pass name, program as Python)`` after each pass.
        notes: reports of the passes, for people.
        epilogue: the update that follows the evaluations, once attached.
        guards: decides for which batches the program is valid.
        freedom: how few sizes are left open, a number of :data:`zowrap.compiler.capture.FREEDOMS`.
        credit: what the outputs after the weights hold, of a program with residual credit.
    """

    graph_module: fx.GraphModule
    inputs: list[Input]
    constants: dict[str, torch.Tensor]
    fake_mode: FakeTensorMode
    points: int = 1
    history: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    epilogue: fx.GraphModule | None = None
    guards: Guards = field(default_factory=lambda: Guards({}, None))
    freedom: int = 0
    credit: list[Use] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def placeholder(self, kind: str, target: str) -> fx.Node | None:
        """The placeholder of an input, or None if there is none."""
        for node, given in zip(self.graph.find_nodes(op="placeholder"), self.inputs, strict=True):
            if given.kind == kind and given.target == target:
                return node
        return None

    def add_input(self, target: str, value: torch.Tensor) -> fx.Node:
        """Append an ``"added"`` placeholder shaped like ``value``."""
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(target.replace(".", "_").replace("/", "_"))
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        self.inputs.append(Input(node.name, "added", target))
        return node

    def fakes(self) -> list[Any]:
        """The fake values of the placeholders, in order."""
        return [node.meta["val"] for node in self.graph.find_nodes(op="placeholder")]

    def finish(self, name: str) -> None:
        """Finish a pass: drop dead nodes, recompile the Python and add it to the history.

        Raises:
            RuntimeError: the graph is malformed or, with ``CHECK_SHAPES``, its shapes are inconsistent.
        """
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.graph_module.recompile()
        if CHECK_SHAPES:
            self.propagate_shapes()
        self.history.append((name, str(self.graph_module.code)))

    def propagate_shapes(self) -> None:
        """Recompute every node's symbolic shape from the inputs; an inconsistent graph raises an error."""
        with symbolic_sizes(self.fake_mode):
            FakeTensorProp(self.graph_module, self.fake_mode).propagate_dont_convert_inputs(*self.fakes())

    def accepts(self, batch: dict[str, Any]) -> bool:
        """Whether the program is valid for ``batch``, which has its signature."""
        return self.guards.hold(batch)

    @property
    def varies(self) -> bool:
        """Whether any size of its batch is left open."""
        given = zip(self.inputs, self.fakes(), strict=True)
        tensors = [value for each, value in given if each.kind == "batch" and isinstance(value, torch.Tensor)]
        return any(isinstance(size, torch.SymInt) for value in tensors for size in value.shape)

    def clone(self) -> Program:
        """Copy the program so that passes may rewrite it; tensors and symbolic sizes are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        graph.output(output)
        module = fx.GraphModule(self.graph_module, graph)
        return replace(
            self,
            graph_module=module,
            inputs=list(self.inputs),
            history=list(self.history),
            notes=dict(self.notes),
            credit=list(self.credit),
        )

    def code(self) -> str:
        """The program as Python with shapes, headed by the passes that made it."""
        self.propagate_shapes()
        text = f"# {len(self.graph.nodes)} nodes after: {' → '.join(name for name, _ in self.history)}\n"
        text += self.graph_module.print_readable(print_output=False)
        if self.epilogue is not None:
            text += "\n" + self.epilogue.print_readable(print_output=False)
        return text

    def fingerprint(self) -> str:
        """Hash what the program computes: its operations, shapes and the names of its constants."""
        digest = hashlib.blake2b(digest_size=8)
        for node in self.graph.nodes:
            target = getattr(node.target, "__qualname__", str(node.target)) if callable(node.target) else node.target
            name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else target
            digest.update(f"{node.op} {name} {node.args} {node.kwargs}".encode())
        for given, value in zip(self.inputs, self.fakes(), strict=True):
            size = [str(s) for s in value.shape] if isinstance(value, torch.Tensor) else ""
            digest.update(f"{given.kind}:{given.target} {size} {getattr(value, 'dtype', '')}".encode())
        return digest.hexdigest()

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the graph node by node, uncompiled."""
        with torch.no_grad():
            return self.graph_module(*inputs)


def verify(program: Program) -> None:
    """Check the invariants of every program.

    Raises:
        ZOInternalError: the placeholders differ from ``inputs``, a node writes into a tensor or calls a module, or the
            outputs are not ``points`` losses, the weights, and what residual credit adds.
    """
    placeholders = program.graph.find_nodes(op="placeholder")
    if [n.name for n in placeholders] != [given.node for given in program.inputs]:
        raise ZOInternalError("the program's placeholders and its list of inputs disagree")
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            raise ZOInternalError(f"{node.format_node()} writes into a tensor: only the epilogue may")
        if node.op in ("call_module", "call_method"):
            raise ZOInternalError(f"{node.format_node()} calls back into Python modules")
    outputs = program.graph.output_node().args[0]
    expected = program.points + 1 + sum(len(use.outputs) for use in program.credit)
    if not isinstance(outputs, tuple | list) or len(outputs) != expected:
        raise ZOInternalError(f"the program must return {program.points} losses and the weights, then credit")
