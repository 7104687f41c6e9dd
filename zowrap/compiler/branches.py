"""Capture a forward that branches on values of its batch: ``if mask.any()``, ``assert lengths.max() <= width``.

Export follows one path through the model's Python code and knows no values. Here the path is that of the example batch:
the model runs once as it is, and the numbers that it takes out of tensors (``.item()``, ``bool(...)``) answer the same
questions while it is captured. The conditions become guards on values, besides those on sizes: a program is valid for
the batches that give the same answers. A small program computes the numbers of a batch; it reads no weights, because
they move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.sym_node import SymNode
from torch.overrides import TorchFunctionMode

from zowrap.errors import ZOCaptureError

Number = bool | int | float

# The ways in which Python takes a number out of a tensor, each with what it makes of it. ``int`` has to be a plain one,
# so every value of it gets a program of its own; with ``float`` nearly every batch would.
_TAKEN: dict[Any, Callable[[Any], Any]] = {
    Tensor.item: lambda number: number,
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__index__: int,
}


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
        plain_forward, plain_bool, plain_int = module.forward, SymNode.guard_bool, SymNode.guard_int

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
            found = self._evaluate(node)
            if found not in (sympy.true, sympy.false):
                return plain_bool(node, file, line)
            self.conditions.append(Condition(node.expr, bool(found)))
            return bool(found)

        def guard_int(node: Any, file: str, line: int) -> int:
            found = self._evaluate(node)
            if found is None or not found.is_Integer:
                return plain_int(node, file, line)
            self.conditions.append(Condition(sympy.Eq(node.expr, found, evaluate=False), True))
            return int(found)

        module.forward = forward
        SymNode.guard_bool, SymNode.guard_int = guard_bool, guard_int  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            SymNode.guard_bool, SymNode.guard_int = plain_bool, plain_int  # type: ignore[method-assign]
            del module.forward

    def _evaluate(self, node: Any) -> Any:
        """The value of an expression of numbers for the example batch; None if it is one of anything else."""
        known = {symbol: _to_sympy(n) for symbol, n in zip(self.symbols, self.numbers, strict=False) if symbol}
        asked = node.expr
        if not asked.free_symbols & known.keys():
            return None
        sizes = {s: node.shape_env.size_hint(s, allow_none=True) for s in asked.free_symbols - known.keys()}
        return None if None in sizes.values() else asked.xreplace({**known, **sizes})


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
    """The symbol that a number without a known value consists of."""
    if not isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool):
        return None
    symbols = number.node.expr.free_symbols
    return next(iter(symbols)) if len(symbols) == 1 else None


def _to_sympy(number: Number) -> Any:
    return sympy.Float(number) if isinstance(number, float) else sympy.Integer(int(number))


class BatchNumbers:
    """Computes the numbers that a captured forward takes out of its batch, and what follows from them.

    Args:
        graph: of the captured program.
        wanted: the node of each number's tensor.
        inputs: the kind of each placeholder, and the name in its batch or the tensor that it stands for.
        branches: what was asked of the numbers while the program was captured.
        shape_env: knows which of its symbols are sizes of the batch.
        sizes: the symbols that are.

    Raises:
        ZOCaptureError: a number depends on the weights, which move, or is compared with a size that no tensor has.
    """

    def __init__(
        self,
        graph: fx.Graph,
        wanted: Sequence[fx.Node],
        inputs: Sequence[tuple[str, Any]],
        branches: Branches,
        shape_env: Any,
        sizes: Set[sympy.Symbol],
    ) -> None:
        self._symbols = list(branches.symbols)
        asked = {Condition(shape_env.replace(c.expression), c.answer) for c in branches.conditions}
        self._conditions = sorted(asked, key=str)
        if any(each.expression.free_symbols - sizes - set(self._symbols) for each in asked):
            raise ZOCaptureError("the model compares a number of its batch with a size that no tensor of it has")
        needed: set[fx.Node] = set()
        open_nodes = list(wanted)
        while open_nodes:
            node = open_nodes.pop()
            if node not in needed:
                needed.add(node)
                open_nodes += node.all_input_nodes
        own = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self._sources: list[tuple[str, Any]] = []
        placeholders = iter(inputs)
        for node in graph.nodes:
            source = next(placeholders) if node.op == "placeholder" else None
            if node not in needed:
                continue
            if source is not None:
                if source[0] == "parameter":
                    raise ZOCaptureError("the model branches on a number that depends on its weights, which move")
                self._sources.append(source)
            copies[node] = own.node_copy(node, copies.__getitem__)
        own.output([copies[node] for node in wanted])
        self._program = fx.GraphModule({}, own)

    def answer_alike(self, batch: Mapping[str, Any], sizes: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
        """Whether the numbers of a batch answer every question as those of the example did.

        A batch on the ``meta`` device has no numbers, and any way will do to analyse it. On a GPU this waits for the
        device.
        """
        given = [batch[of] if kind == "batch" else of for kind, of in self._sources]
        if any(isinstance(value, Tensor) and value.device.type == "meta" for value in given):
            return True
        with torch.no_grad():
            numbers = [tensor.item() for tensor in self._program(*given)]
        known = {symbol: _to_sympy(n) for symbol, n in zip(self._symbols, numbers, strict=True) if symbol}
        values = {**sizes, **known}
        return all(bool(each.expression.xreplace(values)) == each.answer for each in self._conditions)
