"""For which sizes of a batch a captured program is right.

Capture follows one way through the model's Python. What the model asked of its sizes there (``n > 32``, ``n == m``) is
kept: where it is false for a batch, Python would have gone another way, and the batch needs a program of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch


class Guards:
    """What a program asks of the sizes of a batch.

    Args:
        sizes: of each tensor of the batch, by name; symbolic where they vary.
        shape_env: where capture noted what was asked of the symbols.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int | torch.SymInt]], shape_env: Any) -> None:
        # Taken now: compiling asks more, which it checks itself.
        self._sizes = {
            name: [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in shape]
            for name, shape in sizes.items()
        }
        self._asked = [] if shape_env is None else [shape_env.replace(guard.expr) for guard in shape_env.guards]
        self._known: dict[tuple, bool] = {}

    def hold(self, batch: Mapping[str, Any]) -> bool:
        """Whether the program is right for the sizes of ``batch``, of the names and ranks of the captured one."""
        sizes = self._sizes_of(batch)
        if sizes not in self._known:
            self._known[sizes] = self._fit(sizes)
        return self._known[sizes]

    def accept(self, batch: Mapping[str, Any]) -> None:
        """Take the program as right for the sizes of the very batch that it was captured with."""
        self._known[self._sizes_of(batch)] = True

    def _sizes_of(self, batch: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(batch[name].shape) for name in self._sizes)

    def _fit(self, sizes: tuple[tuple[int, ...], ...]) -> bool:
        pairs = [
            (expression, size)
            for shape, given in zip(self._sizes.values(), sizes, strict=True)
            for expression, size in zip(shape, given, strict=True)
        ]
        values: dict[sympy.Symbol, sympy.Integer] = {}
        for expression, size in pairs:
            if isinstance(expression, sympy.Symbol):
                values.setdefault(expression, sympy.Integer(size))
        # What depends on a symbol that is no tensor's own size stays open: neither is then true or false.
        wrong = (sympy.Eq(expression, size).xreplace(values) for expression, size in pairs)
        unmet = (expression.xreplace(values) for expression in self._asked)
        return not any(found == sympy.false for found in (*wrong, *unmet))
