"""Repeated layers are compiled once.

A transformer is one layer many times over. Its program is cut into *regions* along the layers that the nodes came
from, regions that compute the same are recognised, and each kind is compiled once, with weights and keys as inputs:

    embedding ── layer 0 ── layer 1 ── … ── layer N−1 ── head
       (a)         (b)        (b)              (b)        (c)       three compilations, whatever N

With one active block the layers below it, the block and those above it are three kinds, the same three whichever
block is active, so the programs of all blocks share their regions.

    stage of a node      its layer's; outside of layers, after the last layer it depends on
    weights' own nodes   (noise of a vector, its perturbation) move to the first stage that uses them
    glue                 picks one parameter's key or factors out of those of all; runs as it is, between the regions

Several directions of one step are evaluated on one batch with one set of weights. What no direction reaches is the same
for all of them: calls whose arguments are the batch and the weights alone are *shared*, and run for the first direction
only. Where a step has several, a layer is cut in two at the first perturbed weight.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from zowrap.compiler.inductor import Compiled, compile_graph, symbolic_sizes
from zowrap.compiler.program import Program

aten = torch.ops.aten
MIN_LAYERS = 3  # below, one compilation of the whole is as fast and lets the compiler fuse across layers
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_GLUE = {aten.select.int, aten.slice.Tensor, aten.view.default, aten.sym_size.int}


@dataclass
class Kind:
    """Regions that compute the same: one compilation.

    Attributes:
        outputs: fake values of the outputs, in order.
    """

    compiled: Compiled
    outputs: list[Any]


@dataclass(frozen=True)
class Slot:
    """Where a value lies among those of a running program."""

    number: int


@dataclass
class Call:
    """One call of a running program: a compiled region, or a view from between them.

    Attributes:
        arguments: values, and a :class:`Slot` wherever one is read, also inside of lists.
        results: the slots that the results go to, in order.
        last_used: the slots that nothing reads after this call.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    results: list[int]
    last_used: list[int] = field(default_factory=list)

    def reads(self, slot: int) -> bool:
        """Whether a value is among the arguments."""
        return slot in _slots_in(self.arguments)


@dataclass
class Regions:
    """A program as a sequence of calls. Call it with the program's inputs in order.

    Attributes:
        slots: how many values there are; the inputs come first.
        outputs: a :class:`Slot` for each.
        shared: numbers of the calls that no direction reaches, and ``border``: what others read of their results.
        seconds: spent on the kinds of region that no program had before.
        compilations: how many those were, and ``cached`` how many of them lay ready from an earlier process.
        count: regions that one call runs.
    """

    calls: list[Call]
    slots: int
    outputs: list[Any]
    seconds: float = 0.0
    compilations: int = 0
    cached: int = 0
    count: int = 0
    shared: frozenset[int] = frozenset()
    border: frozenset[int] = frozenset()

    def __call__(
        self,
        *inputs: Any,
        kept: dict[int, Any] | None = None,
        after: Callable[[int, list[Any]], None] = lambda number, values: None,
    ) -> list[Any]:
        """Run the program.

        Args:
            kept: results of shared calls on the same batch and weights, by slot; filled where it is empty.
            after: called with the number of each call that was run, and all values by slot.
        """
        values: list[Any] = [*inputs, *([None] * (self.slots - len(inputs)))]
        reused = bool(kept)
        if kept:
            for slot, value in kept.items():
                values[slot] = value
        for number, call in enumerate(self.calls):
            if reused and number in self.shared:
                continue
            given = [_fill(a, values) for a in call.arguments]
            made = call.function(*given)
            if len(call.results) == 1 and not isinstance(made, tuple | list):
                values[call.results[0]] = made
            else:
                for slot, value in zip(call.results, made, strict=True):
                    values[slot] = value
            if kept is not None and number in self.shared:
                kept.update({slot: values[slot] for slot in call.results if slot in self.border})
            del given, made
            for slot in call.last_used:  # an activation lives no longer than its last reader
                values[slot] = None
            after(number, values)
        return [_fill(o, values) for o in self.outputs]


def _fill(argument: Any, values: list[Any]) -> Any:
    if type(argument) is Slot:
        return values[argument.number]
    if isinstance(argument, list | tuple):
        return type(argument)(_fill(a, values) for a in argument)
    return argument


@dataclass
class Region:
    """Nodes that are compiled together.

    Attributes:
        nodes: in the order they run.
        inputs: the nodes outside that they read.
        outputs: those of them that are read outside.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


@dataclass
class Pieces:
    """A program, cut up. All of ``glue`` runs first, then the regions one after another.

    Attributes:
        glue: views that pick a part of what is given for all parameters, and sizes of the inputs.
    """

    glue: list[fx.Node]
    regions: list[Region]


def compile_regions(
    program: Program,
    kinds: dict[str, Kind],
    min_layers: int = MIN_LAYERS,
    tell: Callable[[int, int], None] = lambda number, count: None,
    share: bool = False,
) -> Regions:
    """Compile a finished program region by region.

    Args:
        kinds: what is compiled already, by its text; grows.
        min_layers: with fewer layers the program is one region.
        tell: called before a kind of region is compiled, with its number among the program's kinds and their count.
        share: several directions will be evaluated on one batch, see :func:`cut`.

    Raises:
        ZOCaptureError: the compiler refused a region.
    """
    start = time.perf_counter()
    return _link(program, cut(program, min_layers, share), kinds, start, tell)


def cut(program: Program, min_layers: int = MIN_LAYERS, share: bool = False) -> Pieces:
    """Divide a program into glue and regions.

    Args:
        min_layers: with fewer layers the program is one region.
        share: what a direction reaches is apart from what none reaches, wherever the latter multiplies by a matrix.
    """
    glue = _glue(program)
    stages = _stages(program, glue, min_layers)
    reached = _reached(program) if share else set()
    by_stage: dict[tuple[int, bool], list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in glue:
            by_stage.setdefault((stages[node], node in reached), []).append(node)
    for stage, before in [(stage, nodes) for (stage, hit), nodes in by_stage.items() if not hit]:
        after = by_stage.get((stage, True))
        if after is not None and not any(map(_reads_a_matrix, before)):  # too little to be worth a region of its own
            members = {*before, *after}
            by_stage[stage, True] = [node for node in program.graph.nodes if node in members]
            del by_stage[stage, False]
    regions = [_region(by_stage[key]) for key in sorted(by_stage)]
    return Pieces([n for n in program.graph.nodes if n in glue], regions)


def _reached(program: Program) -> set[fx.Node]:
    """Nodes that a direction reaches."""
    added = {given.node for given in program.inputs if given.kind == "added"}
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in added or any(given in reached for given in node.all_input_nodes):
            reached.add(node)
    return reached


def _reads_a_matrix(node: fx.Node) -> bool:
    """Whether a node multiplies by a weight, or looks rows of one up."""
    given = (n.meta.get("val") for n in node.all_input_nodes if n.op == "placeholder")
    return any(isinstance(value, torch.Tensor) and value.ndim > 1 and value.is_floating_point() for value in given)


def _link(
    program: Program, pieces: Pieces, kinds: dict[str, Kind], start: float, tell: Callable[[int, int], None]
) -> Regions:
    """Give every value a slot, compile the kinds that are new, and find where each value is read last."""
    graph = program.graph
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
    inputs = len(slots)
    calls: list[Call] = []
    compilations = cached = 0

    def slot_of(node: fx.Node) -> Slot:
        return Slot(slots[node])

    def add(function: Callable[..., Any], arguments: list[Any], results: list[fx.Node]) -> None:
        for node in results:
            slots[node] = len(slots)
        calls.append(Call(function, arguments, [slots[n] for n in results]))

    for node in pieces.glue:
        if "val" not in node.meta:
            node.meta["val"] = _fake(program, node)
        add(cast("Callable[..., Any]", node.target), [_mapped(a, slot_of) for a in node.args], [node])
    # Texts need values that only compiling what comes before brings; operators tell kinds apart well enough to count.
    # They are taken before views leave their regions.
    outlines = [_outline(region) for region in pieces.regions]
    told = list(dict.fromkeys(outlines))
    for region, outline in zip(pieces.regions, outlines, strict=True):
        for node in _take_views_out(region):
            if "val" not in node.meta:
                node.meta["val"] = _fake(program, node)
            add(cast("Callable[..., Any]", node.target), [_mapped(a, slot_of) for a in node.args], [node])
        if not region.outputs:
            continue
        for size in _bind_sizes(program, region):
            add(aten.sym_size.int, [_mapped(a, slot_of) for a in size.args], [size])
        text = text_of(region)
        if text not in kinds:
            tell(told.index(outline) + 1, len(told))
            kinds[text] = _compile(program, region)
            compilations += 1
            cached += kinds[text].compiled.cached
        for node, value in zip(region.outputs, kinds[text].outputs, strict=True):
            node.meta["val"] = value  # with the strides that the compiled region gives it
        add(kinds[text].compiled, [slot_of(n) for n in region.inputs], region.outputs)
    outputs = list(_mapped(graph.output_node().args[0], slot_of))
    kept = {o.number for o in outputs if isinstance(o, Slot)}
    last: dict[int, int] = {}
    for i, call in enumerate(calls):
        for slot in [*_slots_in(call.arguments), *call.results]:
            last[slot] = i
    for slot, i in last.items():
        if slot >= inputs and slot not in kept:
            calls[i].last_used.append(slot)
    shared, border = _shared(program, calls, outputs)
    seconds = time.perf_counter() - start
    return Regions(calls, len(slots), outputs, seconds, compilations, cached, len(pieces.regions), shared, border)


def _shared(program: Program, calls: list[Call], outputs: list[Any]) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the calls that no direction reaches, and the slots of their results that others read."""
    added = {given.node for given in program.inputs if given.kind == "added"}
    reached = {slot for slot, node in enumerate(program.graph.find_nodes(op="placeholder")) if node.name in added}
    shared, made, read = set(), set(), set(_slots_in(outputs))
    for number, call in enumerate(calls):
        if reached.isdisjoint(_slots_in(call.arguments)):
            shared.add(number)
            made.update(call.results)
        else:
            reached.update(call.results)
            read.update(_slots_in(call.arguments))
    return frozenset(shared), frozenset(made & read)


def _mapped(argument: Any, function: Any) -> Any:
    """``argument`` with ``function`` of every node in it."""
    return fx.map_arg(argument, function)


def _slots_in(argument: Any) -> list[int]:
    if isinstance(argument, Slot):
        return [argument.number]
    return [slot for a in argument for slot in _slots_in(a)] if isinstance(argument, list | tuple) else []


def _fake(program: Program, node: fx.Node) -> Any:
    with symbolic_sizes(program.fake_mode):
        args = _mapped(node.args, lambda n: n.meta["val"])
        return node.target(*args)  # type: ignore[operator]


# --- cutting --------------------------------------------------------------------------------------------------------


def _glue(program: Program) -> set[fx.Node]:
    """Views that only pick a part of what is given for all parameters, and the sizes of the inputs."""
    added = {g.node for g in program.inputs if g.kind == "added"}
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _GLUE:
            continue
        size = node.target is aten.sym_size.int
        if all(n in found or (n.op == "placeholder" and (size or n.name in added)) for n in node.all_input_nodes):
            found.add(node)
    return found


def _stages(program: Program, glue: set[fx.Node], min_layers: int) -> dict[fx.Node, int]:
    """2L + 1 for the L-th layer, 2L + 2 for what follows it and belongs to none, 0 for what comes first."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n not in glue]
    layers: dict[str, int] = {}
    for node in nodes:
        if (name := layer_of(node)) is not None:
            layers.setdefault(name, len(layers))
    stages: dict[fx.Node, int] = {}
    if len(layers) < min_layers:
        return dict.fromkeys(nodes, 0)
    weights_only = _from_weights_alone(program)
    for node in nodes:
        before = max((stages.get(n, 0) for n in node.all_input_nodes if n not in weights_only), default=0)
        name = layer_of(node)
        if name is not None:
            stages[node] = max(2 * layers[name] + 1, before)
        else:
            stages[node] = before + before % 2
    for node in reversed(nodes):
        readers = [stages[u] for u in node.users if u in stages]
        if node in weights_only and readers:
            stages[node] = min(readers)
    return stages


def layer_of(node: fx.Node) -> str | None:
    """Path of the outermost numbered module that a node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = list(stack.values())[-1][0]
    match = _LAYER.match(path)
    return match[1] if match else None


def _from_weights_alone(program: Program) -> set[fx.Node]:
    """Nodes that nothing of the batch reaches."""
    batch = {g.node for g in program.inputs if g.kind == "batch"}
    reached: set[fx.Node] = set()
    result: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in batch or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            result.add(node)
    return result


def _region(nodes: list[fx.Node]) -> Region:
    members = set(nodes)
    region = Region(nodes)
    for node in nodes:
        for given in node.all_input_nodes:
            if given not in members and given not in region.inputs:
                region.inputs.append(given)
        if any(user not in members for user in node.users):
            region.outputs.append(node)
    return region


def _take_views_out(region: Region) -> list[fx.Node]:
    """Take the outputs of a region that are only views of what it is given out of it, and list them in order.

    A compiled region that returns views of its inputs may, with sizes among these, return one of the wrong input.
    """
    members, views = set(region.nodes), set()
    for node in region.nodes:
        inside = [given for given in node.all_input_nodes if given in members]
        if _is_view(node) and all(given in views for given in inside):
            views.add(node)
    needed = {node for node in region.outputs if node in views}
    taken: list[fx.Node] = []
    for node in reversed(region.nodes):
        if node in needed:
            taken.insert(0, node)
            needed.update(given for given in node.all_input_nodes if given in views)
    if taken:
        region.outputs = [node for node in region.outputs if node not in views]
        read = set(region.outputs)
        for node in reversed(region.nodes):
            if node in read:
                read.update(node.all_input_nodes)
        region.nodes = [node for node in region.nodes if node in read]
        region.inputs = [node for node in region.inputs if node in read]
    return taken


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.kwargs:
        return False
    returned = node.target._schema.returns
    if torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd"):
        return False  # a reshape copies for some sizes and not for others
    alias = returned[0].alias_info if len(returned) == 1 else None
    return alias is not None and not alias.is_write


def _bind_sizes(program: Program, region: Region) -> list[fx.Node]:
    """Give a region the sizes of the batch that its inputs' are computed of, where none of its inputs has them.

    Of an input of length n − 1 the compiler does not find n. Returns the nodes that read such sizes, which are new.
    """
    added: list[fx.Node] = []
    wanted: set[Any] = set()
    bound: set[Any] = set()
    for node in region.inputs:
        value = node.meta["val"]
        sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
        found = [size.node.expr for size in sizes if isinstance(size, torch.SymInt)]
        wanted |= {symbol for expression in found for symbol in expression.free_symbols}
        bound |= {expression for expression in found if expression.is_symbol}
    for symbol in sorted(wanted - bound, key=str):
        for given in program.graph.find_nodes(op="placeholder"):
            shape = given.meta["val"].shape if isinstance(given.meta.get("val"), torch.Tensor) else ()
            places = [d for d, size in enumerate(shape) if isinstance(size, torch.SymInt) and size.node.expr == symbol]
            if places:
                with program.graph.inserting_after(given):
                    size = program.graph.call_function(aten.sym_size.int, (given, places[0]))
                size.meta["val"] = shape[places[0]]
                region.inputs.append(size)
                added.append(size)
                break
    return added


def text_of(region: Region) -> str:
    """What a region computes, with its values numbered: equal texts compute the same."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in region.inputs:
        names[node] = f"i{len(names)}"
        value = node.meta.get("val")
        described = (value.dtype, list(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value
        lines.append(f"{names[node]}: {described}")
    for node in region.nodes:
        names[node] = f"n{len(names)}"
        args = _mapped((node.args, node.kwargs), lambda n: _Named(names[n]))
        lines.append(f"{names[node]} = {node.target} {args}")
    return "\n".join([*lines, "return " + " ".join(names[n] for n in region.outputs)])


def _outline(region: Region) -> tuple[str, ...]:
    """The operators of a region in order."""
    return tuple(str(node.target) for node in region.nodes)


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _compile(program: Program, region: Region) -> Kind:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta["val"]
    for node in region.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in region.outputs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    with symbolic_sizes(program.fake_mode):
        fakes = _make_distinct([node.meta["val"] for node in region.inputs], program.fake_mode)
        FakeTensorProp(module, program.fake_mode).propagate_dont_convert_inputs(*fakes)
    outputs = [copies[n].meta["val"] for n in region.outputs]
    return Kind(compile_graph(module, fakes), outputs)


def _make_distinct(values: list[Any], mode: Any) -> list[Any]:
    """Replace every fake tensor that occurs a second time by another one like it.

    Equal outputs of two regions of one kind are one fake tensor. The compiler takes one object for one input, and would
    read the first of two inputs in the place of both.
    """
    seen: set[int] = set()
    distinct = []
    for value in values:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            with mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        seen.add(id(value))
        distinct.append(value)
    return distinct
