"""How operators of our own are registered: as the dispatcher's plain kernels, with nothing around them.

``torch.library.custom_op`` puts autograd, version counters and a check for aliases around every call, a tenth of a
millisecond that a model of a hundred parameters would pay two hundred times a step. Nothing here is differentiated,
and what is written is said in the schema, which the passes check (:func:`zowrap.compiler.program.verify`).

An operator also states here what passes and the analysis of costs need to know of it (:class:`Traits`, :class:`Cost`).
They look it up by the target of a node (:func:`find`) and keep no lists of operators themselves, so a new operator
touches the one file that defines it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from zowrap.errors import ZOInternalError

_library = torch.library.Library("zowrap", "FRAGMENT")

# Bytes of buffers that are kept from call to call, as :func:`zowrap.ops.scratch.buffers` tells them apart: by purpose,
# dtype and number.
PersistentBuffers = dict[tuple[str, torch.dtype, int], int]


@dataclass(frozen=True)
class Traits:
    """What passes and pictures of a program need to know of an operator.

    Attributes:
        perturbs: name of the argument, a tunable weight, whose values at every point of a step it returns.
        writes: name of the argument, a tunable weight, that it updates in place.
        all_points: one call serves all points of a step and returns one result for each.
        looks_up: it reads no more of a table than the rows that it returns.
        plain_form: torch's own operator of the same arguments, for one that stands in a program only while a pass
            records it under ``vmap``.
    """

    perturbs: str | None = None
    writes: str | None = None
    all_points: bool = False
    looks_up: bool = False
    plain_form: Any = None


@dataclass(frozen=True)
class Cost:
    """What one call costs beside reading its inputs and writing its results; what is left out is nothing.

    Each function takes the operator's arguments that it reads, by their names and as tensors without values, and
    ``result`` where it reads that.

    Attributes:
        flops: floating-point (or integer) operations of products; a multiplication and an addition are two.
        noise: random numbers drawn.
        scratch: bytes held beside inputs and results while it runs, and freed.
        buffers: what it keeps for the next call.
    """

    flops: Callable[..., int] | None = None
    noise: Callable[..., int] | None = None
    scratch: Callable[..., int] | None = None
    buffers: Callable[..., PersistentBuffers] | None = None


class Operator:
    """``torch.ops.zowrap.<name>``, for tensors on every device. Call it like the function that it was made of.

    Attributes:
        argument_names: in order, as in the schema.
        fake: the function of shapes, once :meth:`register_fake` has it.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], traits: Traits, cost: Cost, mutates: Iterable[str]
    ) -> None:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        self.name, self.traits, self.cost = name, traits, cost
        self.argument_names = list(inspect.signature(function).parameters)
        self._check_names()
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        self.qualified, self.__doc__ = f"zowrap::{name}", function.__doc__
        self.overload = getattr(torch.ops.zowrap, name).default
        self.fake: Callable[..., Any] | None = None

    def _check_names(self) -> None:
        named = {name for name in (self.traits.perturbs, self.traits.writes) if name is not None}
        for function in filter(None, (getattr(self.cost, field.name) for field in fields(Cost))):
            named |= inspect.signature(function).parameters.keys() - {"result"}
        if unknown := sorted(named - set(self.argument_names)):
            raise ZOInternalError(f"traits and cost of zowrap::{self.name} name {unknown[0]}, which it does not take")

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.overload(*given, **named)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, for capture and compilers."""
        self.fake = function
        return torch.library.register_fake(self.qualified, function, lib=_library)

    def register_vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The operator over a batch of its arguments, as ``torch.library.register_vmap`` wants it."""
        torch.library.register_vmap(self.qualified, function, lib=_library)
        return function

    def bind(self, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.argument_names, given, strict=False)), **named}

    def flops(self, arguments: Mapping[str, Any]) -> int:
        """See :class:`Cost`; ``arguments`` by name, at least those that are read, with ``"result"``."""
        return _read(self.cost.flops, arguments, 0)

    def noise(self, arguments: Mapping[str, Any]) -> int:
        """See :meth:`flops`."""
        return _read(self.cost.noise, arguments, 0)

    def scratch(self, arguments: Mapping[str, Any]) -> int:
        """See :meth:`flops`."""
        return _read(self.cost.scratch, arguments, 0)

    def buffers(self, arguments: Mapping[str, Any]) -> PersistentBuffers:
        """See :meth:`flops`."""
        return _read(self.cost.buffers, arguments, {})


def _read(function: Callable[..., Any] | None, arguments: Mapping[str, Any], nothing: Any) -> Any:
    if function is None:
        return nothing
    return function(**{name: arguments[name] for name in inspect.signature(function).parameters})


OPERATORS: dict[str, Operator] = {}  # every operator that was imported, by name
_by_target: dict[Any, Operator] = {}


def operator(
    name: str, *, traits: Traits, cost: Cost, mutates: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function of annotated arguments an operator.

    Args:
        name: without the namespace.
        mutates: the arguments that it writes to.

    Raises:
        ZOInternalError: the traits or the cost name an argument that the function does not have.
    """

    def register(function: Callable[..., Any]) -> Operator:
        made = Operator(name, function, traits, cost, mutates)
        OPERATORS[name] = _by_target[made.overload] = made
        return made

    return register


def find(target: Any) -> Operator | None:
    """The operator that a node of that target calls; None where it is not one of ours."""
    return _by_target.get(target) if isinstance(target, torch._ops.OpOverload) else None


def with_trait(trait: str) -> list[Operator]:
    """The operators that have a trait, by its attribute of :class:`Traits`."""
    return [made for made in OPERATORS.values() if getattr(made.traits, trait)]
