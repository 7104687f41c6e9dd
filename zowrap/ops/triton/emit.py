"""Translate an elementwise function, traced to an fx graph, to Triton statements.

The traced functions (:mod:`zowrap.ops.perturb_kernels`, :mod:`zowrap.ops.update_kernels`) consist of about three dozen
operations on three kinds of inputs: arrays, read element by element; small tensors, from which single numbers are read;
and tables. Every operation rounds once, as on a CPU: division and square root are exactly rounded, and products are not
fused with sums (kernels are launched without this fusion).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from zowrap.errors import ZOCaptureError

aten = torch.ops.aten
_NAMES = re.compile(r"[A-Za-z_]\w*")

TYPES = {
    torch.bool: "tl.int1",
    torch.int8: "tl.int8",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}


@dataclass(frozen=True)
class Small:
    """An input from which single numbers are read, or a table; ``pointer`` is the name of its pointer."""

    pointer: str


@dataclass
class Body:
    """The Triton code of a function.

    Attributes:
        once: statements with the same value for every element.
        lines: statements for each element.
        stores: ``(number of the input, expression)`` for each write into an input.
        outputs: expressions of the returned values.
        sums: whether each output is a sum over all elements.
    """

    once: list[str]
    lines: list[str]
    stores: list[tuple[int, str]]
    outputs: list[str]
    sums: list[bool]


def emit(graph_module: fx.GraphModule, inputs: Sequence[str | Small], sizes: Callable[[str], str]) -> Body:
    """Translate a graph to statements.

    Args:
        inputs: for each placeholder, the expression of its element or the pointer to its numbers.
        sizes: maps the name of a symbolic size to its expression, and ``"index <name>"`` to the expression of the index
            along that size.

    Raises:
        ZOCaptureError: an operation has no counterpart in Triton; the message names it.
    """
    return _Emitter(graph_module, inputs, sizes).run()


class _Emitter:
    def __init__(
        self, graph_module: fx.GraphModule, inputs: Sequence[str | Small], sizes: Callable[[str], str]
    ) -> None:
        self.graph, self.sizes = graph_module.graph, sizes
        self.given = dict(zip(self.graph.find_nodes(op="placeholder"), inputs, strict=True))
        self.number = {node: i for i, node in enumerate(self.given)}
        self.text: dict[fx.Node, str | Small] = dict(self.given)
        self.body = Body([], [], [], [], [])
        # Names of values that differ between elements: inputs, indices, and everything computed from them.
        self.elements = {name for text in inputs if isinstance(text, str) for name in _NAMES.findall(text)}

    def run(self) -> Body:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._node(node)
            elif node.op == "output":
                returned = cast("Any", node.args[0])
                for value in returned:
                    self.body.outputs.append(self._read(value))
                    self.body.sums.append(value.target is aten.sum.default)
        return self.body

    def _node(self, node: fx.Node) -> None:
        target: Any = node.target
        if isinstance(made := node.meta.get("val"), Tensor) and made.dtype not in TYPES:
            raise _refused(node)
        if target is aten.copy_.default and node.args[0] in self.number:
            written, value = cast("Any", node.args[:2])
            self.body.stores.append((self.number[written], self._cast(value, written.meta["val"].dtype)))
        elif target in _SAME:
            self.text[node] = self._text(node.args[0])
        elif target is aten.select.int:
            source, _, index = cast("Any", node.args)
            text, held = self._text(source), source.meta["val"]
            if isinstance(text, Small) and held.ndim == 1:
                self._name(node, f"tl.load({text.pointer} + {index % held.shape[0]})")
            elif isinstance(text, str) and self._is_same_for_all(text):
                self.text[node] = text
            else:
                raise _refused(node)
        elif target is aten._unsafe_index.Tensor:
            table, (index,) = cast("Any", node.args)
            self._name(node, f"tl.load({self.text[table].pointer} + {self._read(index)})")  # type: ignore[union-attr]
        elif target is aten.sym_size.int:
            self.text[node] = self.sizes(str(node.meta["val"]))
        elif target is aten.arange.default:
            index = self.sizes(f"index {node.meta['val'].shape[0]}")
            self.elements.add(index)
            self._name(node, f"({index}).to({_type(node)})")
        elif target in _FILLED:
            value = _FILLED[target](*node.args)
            if isinstance(value, fx.Node):
                raise _refused(node)
            self.text[node] = f"tl.full((), {_number(value)}, {_type(node)})"
        elif target is aten.sum.default and _is_exact_total(node):
            self.text[node] = self._read(node.args[0])
        elif target in _CAST:
            self._name(node, self._cast(node.args[0], node.meta["val"].dtype))
        elif target is aten.view.dtype:
            self._name(node, f"({self._read(node.args[0])}).to({_type(node)}, bitcast=True)")
        elif target in _OPERATIONS:
            self._operation(node)
        else:
            raise _refused(node)

    def _operation(self, node: fx.Node) -> None:
        if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
            raise _refused(node)
        result = node.meta["val"].dtype
        operands = [a for a in node.args if a is not None]
        if node.target is aten.where.self:
            condition, *branches = operands
            texts = [self._read(condition), *(self._cast(b, result) for b in branches)]
        elif result == torch.bool:  # a comparison: use the common dtype of its operands
            common = _common(operands)
            texts = [self._cast(a, common) for a in operands]
        else:
            texts = [self._cast(a, result) for a in operands]
        template = _OPERATIONS[node.target]
        if node.target in _CLAMPS and len(operands) < 3:
            template = _MINIMUM if node.args[1] is None else _MAXIMUM
        if result == torch.bool and node.target is aten.mul.Tensor:
            template = "{0} & {1}"
        if result == torch.float64 and node.target in _FLOAT64:
            template = _FLOAT64[node.target]
        self._name(node, template.format(*texts, type=_type(node)))

    def _cast(self, value: Any, dtype: torch.dtype) -> str:
        """Return the expression of a value, converted to ``dtype``."""
        if not isinstance(value, fx.Node):
            return f"tl.full((), {_number(value)}, {TYPES[dtype]})" if dtype == torch.float64 else _number(value, dtype)
        text, held = self._read(value), value.meta["val"]
        if not isinstance(held, Tensor):
            return text  # a size
        return text if held.dtype == dtype else f"({text}).to({TYPES[dtype]})"

    def _read(self, value: Any) -> str:
        if not isinstance(value, fx.Node):
            return _number(value)
        text = self._text(value)
        if isinstance(text, Small):
            if value.meta["val"].numel() != 1:  # it is unclear which of its numbers is meant
                raise _refused(value)
            name = self._define(f"tl.load({text.pointer})")
            self.text[value] = name
            return name
        return text

    def _text(self, value: Any) -> str | Small:
        if value not in self.text:  # a constant of the function, or an additional result of an operation
            raise _refused(value)
        return self.text[value]

    def _is_same_for_all(self, expression: str) -> bool:
        return self.elements.isdisjoint(_NAMES.findall(expression))

    def _name(self, node: fx.Node, expression: str) -> None:
        self.text[node] = self._define(expression)

    def _define(self, expression: str) -> str:
        name = f"v{len(self.body.once) + len(self.body.lines)}"
        if self._is_same_for_all(expression):
            self.body.once.append(f"{name} = {expression}")
        else:
            self.elements.add(name)
            self.body.lines.append(f"{name} = {expression}")
        return name


def _refused(node: fx.Node) -> ZOCaptureError:
    what = str(node.target) if node.op == "call_function" else f"a value of its own ({node.name})"
    return ZOCaptureError(
        f"the rule or its direction uses {what}, which no GPU kernel can compute with the same bits as a CPU "
        f"(engine='eager' runs it as it is)"
    )


def _is_exact_total(node: fx.Node) -> bool:
    """Return whether a sum is an output and of integers, so that the order of its terms does not matter."""
    return not node.meta["val"].dtype.is_floating_point and all(user.op == "output" for user in node.users)


def _type(node: fx.Node) -> str:
    return TYPES[node.meta["val"].dtype]


def _number(value: Any, dtype: torch.dtype | None = None) -> str:
    if isinstance(value, bool):
        return str(value)
    if dtype is not None and dtype.is_floating_point:
        value = float(value)
    return repr(value) if isinstance(value, int) or math.isfinite(value) else f'float("{value}")'


def _common(operands: Sequence[Any]) -> torch.dtype:
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operands]
    common = values[0]
    for other in values[1:]:
        common = torch.empty((), dtype=torch.result_type(common, other))
    return common.dtype


# Operations that do not change elements; each expression represents one element, whatever its tensor's shape.
_SAME = (
    aten.detach.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.permute.default,
    aten.t.default,
    aten.alias.default,
    aten.clone.default,
)
# For each operation, the value of every element as a function of the operation's arguments.
_FILLED: dict[Any, Callable[..., Any]] = {
    aten.ones.default: lambda size: 1.0,
    aten.ones_like.default: lambda like: 1.0,
    aten.zeros_like.default: lambda like: 0.0,
    aten.full.default: lambda size, value: value,
    aten.full_like.default: lambda like, value: value,
    aten.scalar_tensor.default: lambda value: value,
}
_CAST = (aten._to_copy.default,)
_NAN = "propagate_nan=tl.PropagateNan.ALL"
_MAXIMUM, _MINIMUM = (f"tl.{name}({{0}}, {{1}}, {_NAN})" for name in ("maximum", "minimum"))
_CLAMPS = (aten.clamp.default, aten.clamp.Tensor)
_OPERATIONS: dict[Any, str] = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "tl.div_rn({0}, {1})",
    aten.reciprocal.default: "tl.div_rn(1.0, {0})",
    aten.sqrt.default: "tl.sqrt_rn({0})",
    aten.rsqrt.default: "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    aten.sign.default: "({0} > 0).to({type}) - ({0} < 0).to({type})",  # 0 for NaN
    aten.neg.default: "-{0}",
    aten.abs.default: "tl.abs({0})",
    # The GPU's floor treats subnormal numbers as 0.
    aten.floor.default: "tl.where(({0} < 0.0) & ({0} > -1.0), -1.0, tl.floor({0}))",
    # Round half to even, and keep the sign of 0.
    aten.round.default: "tl.where(tl.abs({0}) <= 0.5, {0} * 0.0, tl.floor({0}) + tl.where({0} - tl.floor({0}) == 0.5, "
    "tl.floor({0}) - 2.0 * tl.floor(tl.floor({0}) * 0.5), tl.where({0} - tl.floor({0}) > 0.5, 1.0, 0.0)))",
    aten.maximum.default: _MAXIMUM,
    aten.minimum.default: _MINIMUM,
    **dict.fromkeys(_CLAMPS, f"tl.minimum(tl.maximum({{0}}, {{1}}, {_NAN}), {{2}}, {_NAN})"),
    aten.clamp_min.default: _MAXIMUM,
    aten.clamp_max.default: _MINIMUM,
    aten.isnan.default: "{0} != {0}",
    aten.isinf.default: 'tl.abs({0}) == float("inf")',
    aten.where.self: "tl.where({0}, {1}, {2})",
    aten.__lshift__.Scalar: "{0} << {1}",
    aten.__rshift__.Scalar: "{0} >> {1}",
    aten.bitwise_and.Scalar: "{0} & {1}",
    aten.bitwise_and.Tensor: "{0} & {1}",
    aten.bitwise_or.Scalar: "{0} | {1}",
    aten.bitwise_or.Tensor: "{0} | {1}",
    aten.bitwise_xor.Tensor: "{0} ^ {1}",
    aten.bitwise_not.default: "~{0}",
    aten.logical_and.default: "{0} & {1}",
    aten.logical_or.default: "{0} | {1}",
    aten.logical_not.default: "{0} == 0",
    **{
        getattr(getattr(aten, name), kind): f"{{0}} {sign} {{1}}"
        for name, sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))
        for kind in ("Tensor", "Scalar")
    },
}
# In float64 the plain division and square root are already exactly rounded.
_FLOAT64: dict[Any, str] = {
    aten.div.Tensor: "{0} / {1}",
    aten.reciprocal.default: "1.0 / {0}",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.rsqrt.default: "1.0 / tl.sqrt({0})",
}
