"""Append the derivative of a small part of a program: cotangents of a node's inputs from the cotangent of its result.

    before            after
    y = tanh(x)       y = tanh(x)
                      y_t = tanh_backward(c, y)          c: the cotangent of y,  y_t: that of x

Only :mod:`zowrap.passes.residual` needs derivatives, and only of what stands between the residual stream and the loss,
or between a product and the stream. No activation of the layers is kept for them.

Operations that move numbers about have their derivative here. That of any other operation is what torch states for it
(``torch.func.vjp``), recorded once when the program is built; nothing of autograd runs in a step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.inductor import symbolic_sizes
from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError, first_line

aten = torch.ops.aten
_SAME_ELEMENTS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
_COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default}
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device}


Cotangent = fx.Node | dict[int, fx.Node]


class Adjoint:
    """Appends derivatives at the end of a program's graph.

    Args:
        program: a functional program; every node has its fake value in ``meta["val"]``.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self._output = program.graph.output_node()

    def add(self, first: fx.Node, second: fx.Node) -> fx.Node:
        """Append the sum of two cotangents of one node."""
        return self.call(aten.add.Tensor, first, second)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append one operation and compute its fake value."""
        with self.graph.inserting_before(self._output):
            node = self.graph.call_function(target, args, kwargs)
        with symbolic_sizes(self.program.fake_mode):
            given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*given[0], **given[1])  # type: ignore[index]
        return node

    def pull_back(self, node: fx.Node, cotangent: Cotangent, wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """Append the cotangents of some of a node's inputs.

        Args:
            node: an operation.
            cotangent: of its result, of its shape and dtype; of an operation with several results, by their number.
            wanted: floating-point inputs of ``node``.

        Returns:
            One node for each of ``wanted``, of its shape and dtype.

        Raises:
            ZOCaptureError: the operation has no derivative.
        """
        simple = _RULES.get(node.target)
        if simple is not None:
            found = [simple(self, node, cotangent, each) for each in wanted]
            if None not in found:
                return cast("list[fx.Node]", found)
        return self._recorded(node, cotangent, wanted)

    def to(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Append a conversion, unless ``node`` has the dtype."""
        same = node.meta["val"].dtype == dtype
        return node if same else self.call(aten._to_copy.default, node, dtype=dtype)

    def resized(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """Append a view of ``node`` with the shape of ``like``."""
        return self.call(aten.reshape.default, node, self.sizes(like))

    def sizes(self, node: fx.Node) -> list[Any]:
        """Return the sizes of a node, those that vary as nodes."""
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, node, dim)
            for dim, size in enumerate(node.meta["val"].shape)
        ]

    def _recorded(self, node: fx.Node, cotangent: Cotangent, wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """Append what torch states as the derivative."""
        inputs = node.all_input_nodes
        chosen = list(cotangent) if isinstance(cotangent, dict) else None
        given = list(cotangent.values()) if isinstance(cotangent, dict) else [cotangent]
        places = [inputs.index(each) for each in wanted]

        def pulled(*together: Any) -> Any:
            cotangents, values = together[: len(given)], together[len(given) :]

            def function(*moving: Any) -> Any:
                by_node = dict(zip(inputs, values, strict=True))
                by_node.update(zip(wanted, moving, strict=True))
                args: Any = fx.map_arg(node.args, lambda n: by_node[n])
                kwargs: Any = fx.map_arg(node.kwargs, lambda n: by_node[n])
                result = cast("Callable[..., Any]", node.target)(*args, **kwargs)
                return result if chosen is None else tuple(result[i] for i in chosen)

            pull: Any = torch.func.vjp(function, *[values[place] for place in places])[1]
            return pull(cotangents[0] if chosen is None else tuple(cotangents))

        values = [each.meta["val"] for each in (*given, *inputs)]
        try:
            with symbolic_sizes(self.program.fake_mode):
                traced = make_fx(pulled)(*values)
        except Exception as error:
            raise ZOCaptureError(
                f"{node.target} stands between a product and the loss, and has no derivative ({first_line(error)})"
            ) from error
        _write_in_place_out(traced)
        _write_constants_out(traced)
        copies = dict(zip(traced.graph.find_nodes(op="placeholder"), [*given, *inputs], strict=True))
        with self.graph.inserting_before(self._output):
            return list(cast("tuple[fx.Node, ...]", self.graph.graph_copy(traced.graph, copies)))


def _write_in_place_out(traced: fx.GraphModule) -> None:
    """Replace operations that write into a tensor, which some derivatives make of new tensors, by those that do not.

    Raises:
        ZOCaptureError: there is no such operation, or what is written to is read under another name.
    """
    for node in traced.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        plain = None if packet is None else getattr(packet, schema.overload_name or "default", None)
        written = node.args[0]
        if plain is None or written.op != "call_function" or _is_view(written):
            raise ZOCaptureError(f"the derivative of what follows the residual stream writes in place ({node.target})")
        node.target = plain
        written.replace_all_uses_with(node, lambda user, after=node: user > after)


def _is_view(node: fx.Node) -> bool:
    returned = node.target._schema.returns  # type: ignore[union-attr]
    return any(each.alias_info is not None for each in returned)


def _write_constants_out(traced: fx.GraphModule) -> None:
    """Replace numbers that recording keeps as tensors of the module by operations that make them.

    Raises:
        ZOCaptureError: a constant is more than a number.
    """
    traced.graph.eliminate_dead_code()  # sizes are asked of a few that nothing else reads
    for node in traced.graph.find_nodes(op="get_attr"):
        value: torch.Tensor = getattr(traced, str(node.target))
        if value.ndim:
            raise ZOCaptureError("the derivative of what follows the residual stream holds a constant tensor")
        with traced.graph.inserting_before(node):
            options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            made = traced.graph.call_function(aten.full.default, ([], value.item()), options)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        traced.graph.erase_node(node)


Simple = Callable[[Adjoint, fx.Node, Any, fx.Node], "fx.Node | None"]
_RULES: dict[Any, Simple] = {}


def _rule(*targets: Any) -> Callable[[Simple], Simple]:
    def register(function: Simple) -> Simple:
        _RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _alike(a: fx.Node, b: fx.Node) -> bool:
    first, second = a.meta["val"], b.meta["val"]
    return first.dtype == second.dtype and str(first.shape) == str(second.shape)


@_rule(aten.add.Tensor)
def _add(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node | None:
    plain = not node.kwargs and len(node.args) == 2 and node.args[0] is not node.args[1]
    return cotangent if plain and _alike(node, wanted) else None


@_rule(torch.ops.zowrap.head_credit.default)
def _head(adjoint: Adjoint, node: fx.Node, cotangent: dict[int, fx.Node], wanted: fx.Node) -> fx.Node | None:
    if wanted is not node.args[0] or list(cotangent) != [0]:
        return None
    own = adjoint.call(operator.getitem, node, 1)
    rows = adjoint.call(aten.unsqueeze.default, adjoint.call(aten.unsqueeze.default, cotangent[0], -1), -1)
    return _cast(adjoint, node, adjoint.call(aten.mul.Tensor, own, rows), wanted)


@_rule(aten.linear.default)
def _linear(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node | None:
    weight = cast("fx.Node", node.args[1])
    if wanted is not node.args[0] or wanted is weight or weight.meta["val"].ndim != 2:
        return None
    return adjoint.call(aten.matmul.default, cotangent, weight)


@_rule(torch.ops.zowrap.int8_linear.default)
def _int8(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node | None:
    """By the inputs, as if they were not rounded; and by the scales of the rows, exactly: y is linear in them."""
    x, codes, scale, bias, _ = cast("tuple[fx.Node, ...]", node.args)
    if wanted is x:
        dtype = cotangent.meta["val"].dtype
        scaled = adjoint.to(adjoint.call(aten.mul.Tensor, cotangent, scale), dtype)
        return adjoint.call(aten.matmul.default, scaled, adjoint.to(codes, dtype))
    if wanted is not scale:
        return None
    y = node if bias is None else adjoint.call(aten.sub.Tensor, node, bias)
    both = adjoint.call(aten.mul.Tensor, adjoint.to(y, torch.float32), adjoint.to(cotangent, torch.float32))
    rows = adjoint.call(aten.reshape.default, both, [-1, both.meta["val"].shape[-1]])
    return adjoint.call(aten.div.Tensor, adjoint.call(aten.sum.dim_IntList, rows, [0]), scale)


@_rule(*_COPIES)
def _copy(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node:
    return cotangent


@_rule(*_CASTS)
def _cast(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node:
    return adjoint.to(cotangent, wanted.meta["val"].dtype)


@_rule(*_SAME_ELEMENTS)
def _view(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node:
    return adjoint.resized(cotangent, wanted)


@_rule(aten.transpose.int)
def _transpose(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node:
    return adjoint.call(aten.transpose.int, cotangent, *node.args[1:])


@_rule(aten.permute.default)
def _permute(adjoint: Adjoint, node: fx.Node, cotangent: fx.Node, wanted: fx.Node) -> fx.Node:
    order = [dim % len(node.args[1]) for dim in node.args[1]]  # type: ignore[arg-type, operator, union-attr]
    return adjoint.call(aten.permute.default, cotangent, [order.index(dim) for dim in range(len(order))])
