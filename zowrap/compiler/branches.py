"""Capture a forward that branches on values of its batch: ``if mask.any()``, ``assert lengths.max() <= width``.

Export follows one path through the model's Python code and knows no values. Here the path is that of the example batch:
the model runs once as it is, and the numbers that it takes out of tensors (``.item()``, ``bool(...)``) answer the same
questions while it is captured. The conditions become guards on values, besides those on sizes: a program is valid for
the batches that give the same answers. A small program computes the numbers of a batch. It reads neither weights, which
move, nor buffers, which a user may exchange.

The eager engine is left with what would need a program for nearly every batch (``int(...)`` and ``float(...)``, which
have to be plain numbers), and with what rests on more than such conditions (a number as a size).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import Tensor, fx, nn
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from zowrap.errors import ZOCaptureError

Number = bool | int | float

# The ways in which Python takes a number out of a tensor, each with what it makes of it.
_TAKEN: dict[Any, Callable[[Any], Any]] = {Tensor.item: lambda number: number, Tensor.__bool__: bool}


@dataclass(frozen=True)
class Condition:
    """A question that the model asked, in symbols of sizes and of numbers, and its answer for the example batch."""

    expression: Any
    answer: bool


class Branches:
    """The numbers that a model takes out of tensors for one example batch, and the conditions that it puts on them.

    Args:
        numbers: in the order in which a forward takes them.

    Attributes:
        conditions: those of the last forward that was captured.
        symbols: the symbol of each number, of the same forward; None for one that export knows.
    """

    def __init__(self, numbers: Sequence[Number]) -> None:
        self.numbers = list(numbers)
        self.conditions: list[Condition] = []
        self.symbols: list[sympy.Symbol | None] = []

    @classmethod
    def record(cls, forward: Callable[[], Any]) -> Branches:
        """Run a forward as it is, and keep the numbers that it takes."""
        numbers: list[Number] = []

        def keep(tensor: Tensor) -> Number:
            numbers.append(tensor.item())
            return numbers[-1]

        with _Taking(keep):
            forward()
        return cls(numbers)

    @contextmanager
    def answering(self, module: nn.Module) -> Iterator[None]:
        """While inside, the forward of ``module`` can be captured; it also returns the tensors that it takes from."""
        plain_forward, plain_guard = module.forward, SymNode.guard_bool

        @functools.wraps(plain_forward)
        def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            self.conditions, self.symbols = [], []
            asked: list[Tensor] = []

            def take(tensor: Tensor) -> Any:
                number = tensor.item()
                asked.append(tensor.clone())
                self.symbols.append(_symbol_of(number))
                return number

            with _Taking(take):
                returned = plain_forward(*args, **kwargs)
            if len(asked) != len(self.numbers):
                raise ZOCaptureError("the model takes other numbers out of its tensors when it runs again")
            return (*returned, *asked)

        def guard_bool(node: Any, file: str, line: int) -> bool:
            answer = self._answer(node)
            if answer is None:
                return plain_guard(node, file, line)
            self.conditions.append(Condition(node.expr, answer))
            return answer

        module.forward = forward
        SymNode.guard_bool = guard_bool  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            SymNode.guard_bool = plain_guard  # type: ignore[method-assign]
            del module.forward

    def _answer(self, node: Any) -> bool | None:
        """The answer to a question about numbers, for the example batch; None if it is about anything else."""
        known = {symbol: _to_sympy(n) for symbol, n in zip(self.symbols, self.numbers, strict=False) if symbol}
        symbols = node.expr.free_symbols
        if not symbols & known.keys():
            return None
        sizes = {s: node.shape_env.size_hint(s, allow_none=True) for s in symbols - known.keys()}
        return None if None in sizes.values() else _decide(node.expr, {**known, **sizes})


class _Taking(TorchFunctionMode):
    """Calls ``take`` for each number that Python takes out of a tensor while inside."""

    def __init__(self, take: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKEN and isinstance(args[0], Tensor) and args[0].numel() == 1:
            return _TAKEN[func](self.take(args[0]))
        return func(*args, **(kwargs or {}))


def _symbol_of(number: Any) -> sympy.Symbol | None:
    """The symbol that stands for a number without a known value; a yes or no is written as ``Eq(symbol, 1)``."""
    if not isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool):
        return None
    expression, symbols = number.node.expr, free_unbacked_symbols(number)
    symbol = next(iter(symbols)) if len(symbols) == 1 else None
    return symbol if symbol is not None and expression in (symbol, sympy.Eq(symbol, 1)) else None


def _to_sympy(number: Number) -> Any:
    return sympy.Float(number) if isinstance(number, float) else sympy.Integer(int(number))


def _decide(condition: Any, values: Mapping[sympy.Symbol, Any]) -> bool | None:
    """Whether a condition is true; None if that cannot be decided."""
    if isinstance(condition, Relational) and any(values.get(s) is sympy.nan for s in condition.free_symbols):
        return isinstance(condition, sympy.Ne)  # as in Python; sympy refuses to compare with NaN
    try:
        found = condition.xreplace(values)
    except (TypeError, ZeroDivisionError):
        return None
    return bool(found) if found in (sympy.true, sympy.false) else None


class BatchNumbers:
    """Computes the numbers that a captured forward takes out of its batch, and whether they give the same answers.

    Args:
        module: holds the captured graph.
        taken: the node of each number's tensor.
        inputs: the kind of each placeholder, and its name in the batch or its tensor.
        branches: the numbers' symbols and the conditions, from the same capture.
        shape_env: where the capture kept what it knows about symbols.
        sizes: the symbols that are sizes of the batch.

    Raises:
        ZOCaptureError: the program rests on more than the conditions, or a condition on more than the batch.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        taken: Sequence[fx.Node],
        inputs: Sequence[tuple[str, Any]],
        branches: Branches,
        shape_env: Any,
        sizes: Set[sympy.Symbol],
    ) -> None:
        numbers = {symbol: node for symbol, node in zip(branches.symbols, taken, strict=True) if symbol is not None}
        assumed = [a.expr.free_symbols for each in shape_env.deferred_runtime_asserts.values() for a in each]
        if any(symbol in shape_env.replacements or any(symbol in a for a in assumed) for symbol in numbers):
            raise ZOCaptureError("the model uses a number of its batch as a size, or checks it with torch._check")
        # In the order of asking: where an answer differs, Python would not have come to the next question.
        asked = dict.fromkeys(branches.conditions)
        same = {s: shape_env.replace(s) for c in asked for s in c.expression.free_symbols - numbers.keys()}
        self._conditions = [Condition(c.expression.xreplace(same), c.answer) for c in asked]
        if any(each.expression.free_symbols - sizes - numbers.keys() for each in self._conditions):
            raise ZOCaptureError("the model compares a number of its batch with something that is no size of it")
        used = {symbol for c in self._conditions for symbol in c.expression.free_symbols & numbers.keys()}
        self._programs = {symbol: _extract(module, numbers[symbol], inputs) for symbol in used}

    def answer_alike(self, batch: Mapping[str, Any], sizes: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
        """Whether the numbers of a batch give the answers that those of the example gave.

        A batch on the ``meta`` device has no numbers: it counts as giving them. On a GPU this waits for the device.
        """
        values: dict[sympy.Symbol, Any] = dict(sizes)
        for condition in self._conditions:
            for symbol in condition.expression.free_symbols - values.keys():
                module, sources = self._programs[symbol]
                given = [batch[of] if kind == "batch" else of for kind, of in sources]
                if any(isinstance(value, Tensor) and value.device.type == "meta" for value in given):
                    return True
                with torch.no_grad():
                    values[symbol] = _to_sympy(module(*given).item())
            if _decide(condition.expression, values) != condition.answer:
                return False
        return True


def _extract(
    module: fx.GraphModule, wanted: fx.Node, inputs: Sequence[tuple[str, Any]]
) -> tuple[fx.GraphModule, list[tuple[str, Any]]]:
    """The part of a graph that computes one of its tensors, and what it takes: see ``inputs`` of BatchNumbers."""
    needed: set[fx.Node] = set()
    left = [wanted]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sources: list[tuple[str, Any]] = []
    placeholders = iter(inputs)
    for node in wanted.graph.nodes:
        source = next(placeholders) if node.op == "placeholder" else None
        if node in needed:
            if source is not None:
                if source[0] not in ("batch", "constant"):
                    raise ZOCaptureError(f"the model branches on a number that depends on its {source[0]}s")
                sources.append(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[wanted])
    return fx.GraphModule(module, graph), sources
