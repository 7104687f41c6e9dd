"""Capture the loops over positions of state-space models and linear attention as one operation.

Transformers computes them in plain torch where no kernels are installed: a loop over the positions, or over those of a
chunk. Captured as it stands it fixes the length of every batch, and makes a program of thousands of operations, which
takes minutes. As one operator it is the function that the model calls without us, for every length.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zowrap.custom_op import Cost, Traits, operator


class Scan(NamedTuple):
    """One function of transformers.

    Attributes:
        shaped_like: the argument that its result has the shape of.
        typed_like: the arguments whose promoted dtype its result has; those that are None do not count. Without any it
            is float32.
        state: the arguments that ask for a state, or give one; with them it is captured as it stands.
        pair: whether it returns the result and a state, here None.
    """

    shaped_like: str
    typed_like: tuple[str, ...]
    state: tuple[str, ...]
    pair: bool


_DELTA_RULE = Scan("value", ("query",), ("initial_state", "output_final_state"), pair=True)
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": Scan("hidden_states", (), ("initial_states", "return_final_states"), pair=False),
    "mamba_selective_scan": Scan("hidden_states", ("hidden_states", "D", "z"), ("return_last_state",), pair=False),
}


class _Call(NamedTuple):
    """What a key of the operator stands for: a call with its tensors left out."""

    function: Callable[..., Any]
    scan: Scan
    leaves: tuple[Any, ...]
    spec: Any

    def arguments(self, tensors: list[Tensor]) -> dict[str, Any]:
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


_calls: list[_Call] = []  # by the operator's key, in this process; equal calls of several layers share one


@operator("scan", traits=Traits(), cost=Cost())
def scan(key: int, tensors: list[Tensor]) -> Tensor:
    """Call a scan on its tensors, in order."""
    call = _calls[key]
    result = _apply(call.function, call.arguments(tensors))
    return (result[0] if call.scan.pair else result).contiguous()


@scan.register_fake
def _(key, tensors):
    call = _calls[key]
    given = call.arguments(tensors)
    kinds = [given[name].dtype for name in call.scan.typed_like if given.get(name) is not None]
    like = given[call.scan.shaped_like]
    dtype = functools.reduce(torch.promote_types, kinds) if kinds else torch.float32
    return like.new_empty(like.shape, dtype=dtype)


def _apply(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    bound = inspect.signature(function).bind_partial()
    extra = next((p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    more = arguments.get(extra, {}) if extra else {}
    bound.arguments.update({name: value for name, value in arguments.items() if name != extra})
    return function(*bound.args, **bound.kwargs, **more)


@contextmanager
def capture_scans(model: nn.Module) -> Iterator[None]:
    """Make the modules of a model call :func:`scan` while inside."""
    names = {type(module).__module__ for module in model.modules()}
    places = [(vars(sys.modules[name]), each) for name in names if name in sys.modules for each in SCANS]
    plain = [(place, each, place[each]) for place, each in places if each in place]
    try:
        for place, each, function in plain:
            place[each] = _make_replacement(function, SCANS[each])
        yield
    finally:
        for place, each, function in plain:
            place[each] = function


def _make_replacement(function: Callable[..., Any], kind: Scan) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        leaves, spec = pytree.tree_flatten(given)
        if any(given.get(name) not in (None, False) for name in kind.state) or not _is_plain(leaves):
            return function(*args, **kwargs)
        call = _Call(function, kind, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)
        if call not in _calls:
            _calls.append(call)
        result = scan(_calls.index(call), [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return (result, None) if kind.pair else result

    return replacement


def _is_plain(leaves: list[Any]) -> bool:
    return all(leaf is None or isinstance(leaf, Tensor | bool | int | float | str) for leaf in leaves)
