"""Apply peft's adapters of single parameters (``target_parameters``, such as experts' tensors) without writing.

peft registers a parametrization in every forward and removes it afterwards, which writes to the parameter and makes it
another object: a model may not do that while it is evaluated, and a compiler cannot follow it. The same sum W + BA is
put in the parameter's place for the length of the forward instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_METHOD = "_activate_lora"  # of peft's ParamWrapper: a context manager round the forward of the adapted module


@contextmanager
def apply_without_writing(module: nn.Module) -> Iterator[None]:
    """Let the adapted parameters inside ``module`` be computed while inside, and peft's own way return on leaving."""
    wrappers: list[Any] = [m for m in module.modules() if _adapts_a_parameter(m) and _METHOD not in m.__dict__]
    for wrapper in wrappers:
        setattr(wrapper, _METHOD, partial(_replaced, wrapper))
    try:
        yield
    finally:
        for wrapper in wrappers:
            delattr(wrapper, _METHOD)


def _adapts_a_parameter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.") and hasattr(type(module), _METHOD)


@contextmanager
def _replaced(wrapper: Any, active: list[str]) -> Iterator[None]:
    """Put the adapted parameter in the place of the plain one, as peft computes it for the ``active`` adapters."""
    adapters = [name for name in active if name in wrapper.lora_A]
    holder, name = wrapper.get_base_layer()._parameters, wrapper.parameter_name
    plain = holder[name]
    holder[name] = _adapt(wrapper, plain, adapters) if adapters else plain
    try:
        yield
    finally:
        holder[name] = plain


def _adapt(wrapper: Any, plain: Tensor, adapters: list[str]) -> Tensor:
    if len(adapters) == 1 and wrapper.num_experts > 1 and hasattr(wrapper, "get_delta_factors"):
        left, right, scaling = wrapper.get_delta_factors(adapters[0])
        return torch.baddbmm(plain, left, right, alpha=scaling)
    return plain + sum(wrapper.get_delta_weight(name) for name in adapters)
