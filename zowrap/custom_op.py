"""How operators of our own are registered: as the dispatcher's plain kernels, with nothing around them.

``torch.library.custom_op`` puts autograd, version counters and a check for aliases around every call, a tenth of a
millisecond that a model of a hundred parameters would pay two hundred times a step. Nothing here is differentiated,
and what is written is said in the schema, which the passes check (:func:`zowrap.compiler.program.verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_library = torch.library.Library("zowrap", "FRAGMENT")


class Operator:
    """``torch.ops.zowrap.<name>``, for tensors on every device. Call it like the function that it was made of."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: Iterable[str]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self.qualified, self.__doc__ = f"zowrap::{name}", function.__doc__
        self.overload = getattr(torch.ops.zowrap, name).default

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.overload(*given, **named)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, for capture and compilers."""
        return torch.library.register_fake(self.qualified, function, lib=_library)

    def register_vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The operator over a batch of its arguments, as ``torch.library.register_vmap`` wants it."""
        torch.library.register_vmap(self.qualified, function, lib=_library)
        return function


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function of annotated arguments an operator.

    Args:
        name: without the namespace.
        mutates: the arguments that it writes to.
    """
    return lambda function: Operator(name, function, mutates)
