"""Decide for which batch sizes a captured program is valid.

Capture follows one path through the model's Python code. The conditions on sizes that it met on the way (``n > 32``,
``n == m``) are kept as guards: if one is false for a batch, Python would take another path, and the batch needs its own
program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch


class Guards:
    """The conditions of a program on the sizes of a batch.

    Args:
        sizes: the sizes of each tensor of the batch, by name; symbolic where they vary.
        shape_env: the environment in which capture recorded the conditions; None for no conditions.
    """

    def __init__(self, sizes: Mapping[str, Sequence[int | torch.SymInt]], shape_env: Any) -> None:
        # Copy the guards now: compiling adds more, which it checks itself.
        self._sizes = {
            name: [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in shape]
            for name, shape in sizes.items()
        }
        self._asked = [] if shape_env is None else [shape_env.replace(guard.expr) for guard in shape_env.guards]
        self._known: dict[tuple, bool] = {}

    def hold(self, batch: Mapping[str, Any]) -> bool:
        """Whether the program is valid for ``batch``, which has the names and ranks of the captured one."""
        sizes = self._sizes_of(batch)
        if sizes not in self._known:
            self._known[sizes] = self._fit(sizes)
        return self._known[sizes]

    def accept(self, batch: Mapping[str, Any]) -> None:
        """Accept the sizes of ``batch``, because the program was captured with it."""
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
        # A condition on a symbol that is not the size of any tensor stays undecided, and counts as met.
        wrong = (sympy.Eq(expression, size).xreplace(values) for expression, size in pairs)
        unmet = (expression.xreplace(values) for expression in self._asked)
        return not any(found == sympy.false for found in (*wrong, *unmet))
