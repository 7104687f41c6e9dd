"""Lower the quantised layers of a model, in place, to plain modules that can be captured and tuned; and undo it.

    before                                     after
    (q_proj): Linear8bitLt                     (q_proj): Int8Linear       the same codes and scales, as tensors

No weight is copied and the library is not patched. :func:`raise_back` puts the library's layers back with the tuned
values, so that the model saves and loads as the library's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.quant.layers import Int8Linear, Lowered, Nf4Linear, TorchaoLinear, is_int8_weight_only
from zowrap.quant.schemes import _is_from, check_scheme
from zowrap.step.parameters import canonical_name
from zowrap.step.pretrained import has_adapters


def lowered_layers(model: nn.Module) -> dict[str, Lowered]:
    """The lowered layers of a model by name; a shared layer appears under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Lowered)}


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model is quantised, lowered or not.

    Raises:
        ZOError: it is, by a scheme that is not supported.
    """
    return bool(quantized_kinds(model))


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is itself a quantised layer of a supported kind that is not lowered."""
    return _lowered_class(module) is not None


def quantized_kinds(model: nn.Module, forward_only: bool = False) -> set[type[Lowered]]:
    """The lowered classes of a model's quantised layers, whether they are lowered yet or not.

    Args:
        forward_only: layers that cannot be lowered do not count, because nothing quantised is to move.

    Raises:
        ZOError: a layer is quantised by a scheme that is not supported.
    """
    check_scheme(model, forward_only)
    found: set[type[Lowered]] = set()
    for module in model.modules():
        kind = type(module) if isinstance(module, Lowered) else _lowered_class(module)
        if kind is not None:
            found.add(kind)
    return found


def lower(model: nn.Module, forward_only: bool = False) -> dict[str, Lowered]:
    """Replace every quantised layer by a plain module, in place, and return all lowered layers by name.

    Args:
        forward_only: leave layers of a scheme that is not supported as they are, because nothing quantised is to move.
            So it is with adapters, too.

    Raises:
        ZOError: the scheme is not supported, or layers are on several devices.
    """
    check_scheme(model, forward_only or has_adapters(model))
    made: dict[int, Lowered] = {}

    def replacement(module: nn.Module) -> nn.Module | None:
        lowering = _lowered_class(module)
        if lowering is None:
            return None
        if id(module) not in made:
            made[id(module)] = lowering(module)
        return made[id(module)]

    if replacement(model) is not None:
        raise ZOError("the model is a single quantised layer, which cannot be replaced in place: wrap it in a module")
    _replace_modules(model, replacement)
    found = lowered_layers(model)
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if found and len(devices) > 1:
        raise_back(model)
        where = ", ".join(devices)
        raise ZOError(f"the layers of this quantised model are on several devices ({where}): load the model onto one")
    return found


def raise_back(model: nn.Module) -> None:
    """Put the library's own layers back with the current values: the inverse of :func:`lower`."""
    for module in lowered_layers(model).values():
        module.write_back()
    _replace_modules(model, lambda module: module.original if isinstance(module, Lowered) else None)


@contextmanager
def original_layers(model: nn.Module) -> Iterator[None]:
    """Put the library's own layers back while inside, to save the model; restore the same lowered layers on leaving."""
    again = {id(module.original): module for module in lowered_layers(model).values()}
    raise_back(model)
    try:
        yield
    finally:
        for module in again.values():
            module.detach_again()
        _replace_modules(model, lambda module: again.get(id(module)))


def plain_layer(layer: Lowered, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """Build the ordinary layer for a lowered one, of the class that the model had before it was quantised.

    Args:
        weight: float ``[outputs, inputs]``; layers of the GPT-2 family store its transpose.
    """
    transposed = is_transposed(getattr(layer.original, "source_cls", nn.Linear))
    with torch.device("meta"):
        made: Any
        if transposed:
            made = layer.original.source_cls(layer.out_features, layer.in_features)
        else:
            made = nn.Linear(layer.in_features, layer.out_features, bias=False)
    made.weight = nn.Parameter((weight.t().contiguous() if transposed else weight).to(dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made


def is_transposed(kind: type) -> bool:
    """Whether a class is transformers' ``Conv1D``: a linear layer with a weight ``[inputs, outputs]``."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in kind.__mro__)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a lowered model plain, in place: all weights in ``dtype``, no trace of quantisation in its attributes."""
    made: dict[int, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, Lowered):
            return None
        if id(module) not in made:
            made[id(module)] = plain_layer(module, module.dequantize(), dtype)
        return made[id(module)]

    _replace_modules(model, replacement)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for said in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit"):
            module.__dict__.pop(said, None)
        if hasattr(getattr(module, "config", None), "quantization_config"):
            del module.config.quantization_config  # type: ignore[union-attr]


def mark_fresh(model: nn.Module, names: Iterable[str]) -> None:
    """Record which weights were missing from a model's checkpoint: they start random, and move by default."""
    model.fresh_weights = tuple(sorted(names))  # type: ignore[assignment]


def fresh_weights(model: nn.Module) -> set[str]:
    """The canonical names of the weights recorded by :func:`mark_fresh`."""
    return {
        canonical_name(f"{name}.{fresh}" if name else fresh)
        for name, module in model.named_modules()
        for fresh in module.__dict__.get("fresh_weights", ())
    }


@contextmanager
def hide_quantization(model: nn.Module) -> Iterator[None]:
    """Hide while inside that a model is quantised, because ``transformers.Trainer`` refuses those without adapters.

    It refuses them because integers have no gradient, which zeroth-order steps do not need.
    """
    said = model.__dict__.get("is_quantized")
    if said:
        model.is_quantized = False  # type: ignore[assignment]
    try:
        yield
    finally:
        if said:
            model.is_quantized = said


def _replace_modules(model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            other = None if child is None else replacement(child)
            if other is not None:
                parent._modules[name] = other


# --- schemes --------------------------------------------------------------------------------------------------------


def _lowered_class(module: nn.Module) -> type[Lowered] | None:
    name = type(module).__name__
    if _is_from(module, "bitsandbytes") or name in ("Linear8bitLt", "Linear4bit"):
        import bitsandbytes.nn as library

        if isinstance(module, library.Linear8bitLt):
            return Int8Linear
        if isinstance(module, library.Linear4bit):
            return Nf4Linear
    if isinstance(module, nn.Linear) and is_int8_weight_only(module.weight):
        return TorchaoLinear
    return None
