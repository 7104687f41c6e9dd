"""Decide for which batches a captured program is valid.

Capture follows one path through the model's Python code. The conditions on sizes that it met on the way (``n > 32``,
``n == m``) are kept as guards: if one is false for a batch, Python would take another path, and the batch needs its own
program. Conditions on values of the batch are guards too, see :mod:`zowrap.compiler.branches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.fx.experimental.sym_node import SymNode

from zowrap.compiler.branches import BatchNumbers


class Guards:
    """The conditions of a program on the sizes and numbers of a batch.

    Args:
        sizes: the sizes of each tensor of the batch, by name; symbolic where they vary.
        shape_env: the environment in which capture recorded the conditions; None for no conditions.
        numbers: computes the numbers that the model takes out of a batch; None if it branches on none.
    """

    def __init__(
        self,
        sizes: Mapping[str, Sequence[int | torch.SymInt]],
        shape_env: Any,
        numbers: BatchNumbers | None = None,
    ) -> None:
        # Copy the guards now: compiling adds more, which it checks itself.
        self._sizes = {
            name: [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in shape]
            for name, shape in sizes.items()
        }
        self._asked = [] if shape_env is None else [shape_env.replace(guard.expr) for guard in shape_env.guards]
        self._numbers = numbers
        self._known: dict[tuple, bool] = {}

    @property
    def read_values(self) -> bool:
        """Whether sizes alone do not decide: :meth:`hold` computes numbers of the batch, and waits for them."""
        return self._numbers is not None

    def hold(self, batch: Mapping[str, Any]) -> bool:
        """Whether the program is valid for ``batch``, which has the names and ranks of the captured one."""
        sizes = self._sizes_of(batch)
        if sizes not in self._known:
            self._known[sizes] = self._fit(sizes)
        return self._known[sizes] and (self._numbers is None or self._numbers.answer_alike(batch, self._values(sizes)))

    def accept(self, batch: Mapping[str, Any]) -> None:
        """Accept the sizes of ``batch``, because the program was captured with it."""
        self._known[self._sizes_of(batch)] = True

    def _sizes_of(self, batch: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(batch[name].shape) for name in self._sizes)

    def _pairs(self, sizes: tuple[tuple[int, ...], ...]) -> list[tuple[Any, int]]:
        """Each size as it was captured, and as it is."""
        return [
            (expression, size)
            for shape, given in zip(self._sizes.values(), sizes, strict=True)
            for expression, size in zip(shape, given, strict=True)
        ]

    def _values(self, sizes: tuple[tuple[int, ...], ...]) -> dict[sympy.Symbol, sympy.Integer]:
        """The symbols of sizes, by what they are."""
        values: dict[sympy.Symbol, sympy.Integer] = {}
        for expression, size in self._pairs(sizes):
            if isinstance(expression, sympy.Symbol):
                values.setdefault(expression, sympy.Integer(size))
        return values

    def _fit(self, sizes: tuple[tuple[int, ...], ...]) -> bool:
        values = self._values(sizes)
        # A condition on a symbol that is not the size of any tensor stays undecided, and counts as met.
        wrong = (sympy.Eq(expression, size).xreplace(values) for expression, size in self._pairs(sizes))
        unmet = (expression.xreplace(values) for expression in self._asked)
        return not any(found == sympy.false for found in (*wrong, *unmet))


@contextmanager
def accept_single_rows() -> Iterator[None]:
    """Record no condition while inside where torch's own kernels ask whether a size is 1, and it is not.

    They ask because the strides of such a dimension mean nothing and it may be broadcast. A program that does neither
    is right for a size of 1 as well. What the model asks in Python is recorded.
    """
    plain = SymNode.guard_bool

    def guard_bool(self: Any, file: str, line: int) -> bool:
        if file.endswith(".h") and _is_about_one(self.expr):
            with self.shape_env.suppress_guards():
                found = plain(self, file, line)
            if found == _holds_for_others(self.expr):
                return found
        return plain(self, file, line)

    SymNode.guard_bool = guard_bool  # type: ignore[method-assign]
    try:
        yield
    finally:
        SymNode.guard_bool = plain  # type: ignore[method-assign]


def _is_about_one(expression: Any) -> bool:
    """Whether an expression compares a size with 1."""
    return isinstance(expression, sympy.core.relational.Relational) and sympy.S.One in expression.args


def _holds_for_others(comparison: Any) -> bool:
    """Whether a comparison with 1 is true of the sizes above it."""
    return bool(comparison.func(*[sympy.Integer(2) if arg != 1 else arg for arg in comparison.args]))


@contextmanager
def ask_before_squeezing() -> Iterator[None]:
    """Record while inside whether a dimension that ``squeeze`` would drop has the size 1: torch itself does not."""
    places: list[tuple[Any, Any]] = [(torch.Tensor, torch.Tensor.squeeze), (torch, torch.squeeze)]
    try:
        for place, plain in places:
            place.squeeze = _make_asking(plain)
        yield
    finally:
        for place, plain in places:
            place.squeeze = plain


def _make_asking(plain: Any) -> Any:
    def squeeze(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dims = kwargs.get("dim", args[0] if args else range(input.ndim))
        for dim in dims if isinstance(dims, tuple | list | range) else [dims]:
            bool(input.shape[dim] == 1)
        return plain(input, *args, **kwargs)

    return squeeze
