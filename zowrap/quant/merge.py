"""Merge adapters into their base: plain LoRA into quantised layers too, every other kind by peft's own merging."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line
from zowrap.quant.layers import Int8Linear, Lowered
from zowrap.quant.lowering import plain_layer
from zowrap.quant.schemes import other_scheme_of
from zowrap.step.pretrained import is_peft_model, saved_part

_SAVED_MODULE = "ModulesToSaveWrapper"  # peft's wrapper around a module that is saved with the adapters


def lora_delta(module: Any, adapter: str) -> Tensor:
    """The matrix that one adapter adds to its layer's weight: float32 ``[outputs, inputs]``."""
    product = module.lora_B[adapter].weight.float() @ module.lora_A[adapter].weight.float()
    return product * module.scaling[adapter]


@torch.no_grad()
def merge(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Merge adapters into their base and remove them from ``model``.

    An 8-bit layer is dequantised, changed and quantised again. ``model`` may be one of peft's wrappers, which then
    holds the merged model as its base (``get_base_model()``).

    Args:
        model: with its quantised layers lowered.
        dtype: makes quantised layers with an adapter plain layers of this dtype instead; of the others, those that
            plain LoRA changes.

    Returns:
        For each layer merged here ‖W_new − (W + BA)‖ / ‖BA‖, the relative error that rounding makes in the adapter;
        none for those that peft merged.

    Raises:
        ZOError: there are no adapters, or they cannot be merged into their base. Nothing is merged then.
    """
    layers = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    part = saved_part(model)[0]
    if not layers and not is_peft_model(part):
        raise ZOError("there are no adapters to merge")
    obstacle = next((text for name, m in layers.items() if (text := _why_not_here(name, m))), None)
    if obstacle is None and layers:
        return _merge_lora(model, layers, dtype)
    quantized = next((n for n, m in layers.items() if isinstance(_base_of(m), Lowered) or _is_other(m)), None)
    if quantized is not None:
        raise ZOError(f"{obstacle}, and its base is quantised: only plain LoRA can be merged into quantised layers")
    _merge_by_peft(model, layers, dtype)
    return {}


def _is_adapted(module: Any) -> bool:
    """Whether a module is one of peft's layers round a layer or a parameter of the base."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters") and hasattr(module, "merge")


def _base_of(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module.base_layer


def _is_other(module: Any) -> bool:
    return other_scheme_of(_base_of(module)) is not None


def _why_not_here(name: str, module: Any) -> str | None:
    """Why an adapter is not merged here: it is not a product of two matrices that is added to a linear layer's weight.

    The answer is a clause; None for plain LoRA on a linear layer.
    """
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict) or hasattr(module, "parameter_name"):
        return f"the adapter of {name} is not plain LoRA"
    for adapter in module.active_adapters:
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or getattr(module, "use_dora", {}).get(adapter):
            return f"the adapter of {name} is not plain LoRA (DoRA or another variant)"
        if adapter not in module.lora_A or getattr(module, "lora_bias", {}).get(adapter):
            return f"the adapter of {name} is not a product of two matrices"
    if not isinstance(module.base_layer, nn.Linear | Lowered) or _is_other(module):
        return f"the adapter of {name} is on a {type(module.base_layer).__name__}"
    return None


# --- plain LoRA ------------------------------------------------------------------------------------------------------


def _merge_lora(model: nn.Module, layers: dict[str, Any], dtype: torch.dtype | None) -> dict[str, float]:
    for name, module in layers.items():
        _check_not_tied(model, name, module)
        _check_precision(name, module.base_layer, dtype)
    errors: dict[str, float] = {}
    for name, module in layers.items():
        base = module.base_layer
        change = torch.stack([lora_delta(module, adapter) for adapter in module.active_adapters]).sum(0)
        wanted = (base.dequantize() if isinstance(base, Lowered) else base.weight.float()) + change
        if isinstance(base, Int8Linear) and dtype is None:
            base.requantize(wanted)
            merged = base.dequantize()
        elif isinstance(base, Lowered):
            base = plain_layer(base, wanted, dtype or torch.float32)
            merged = wanted.to(dtype or torch.float32)
        else:
            base.weight.data = wanted.to(dtype or base.weight.dtype)
            merged = base.weight
        lost, size = (merged.float() - wanted).norm(), change.norm()
        errors[name] = float(lost / size) if size > 0 else 0.0  # an adapter of zeros loses nothing
        model.set_submodule(name, base)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == _SAVED_MODULE:
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])  # type: ignore[index, operator]
    _forget_adapters(model)
    return errors


def _forget_adapters(model: nn.Module) -> None:
    """Remove what would make transformers save only adapters."""
    for module in model.modules():
        if module.__dict__.pop("_hf_peft_config_loaded", False):
            module.__dict__.pop("peft_config", None)


def _check_not_tied(model: nn.Module, name: str, module: Any) -> None:
    base = _base_of(module)
    own = {id(weight) for weight in base._parameters.values() if weight is not None}
    for other, holder in model.named_modules():
        if holder is not base and any(id(each) in own for each in holder._parameters.values()):
            raise ZOError(
                f"the weight of {name} is tied to that of {other}, which merging would change as well: export the "
                "adapters on their own with --format adapters"
            )


def _check_precision(name: str, base: Any, dtype: torch.dtype | None) -> None:
    if isinstance(base, Lowered) and not isinstance(base, Int8Linear) and dtype is None:
        few = "4-bit" in base.scheme
        why = "4 bits cannot hold the result" if few else "only bitsandbytes' 8-bit weights can be quantised again"
        raise ZOError(
            f"adapters cannot be merged into {name}, which is {base.scheme}: {why}. Merge them into plain weights with "
            "--format bf16 or fp32"
        )


# --- every other kind ------------------------------------------------------------------------------------------------


def _merge_by_peft(model: nn.Module, layers: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Let peft merge its adapters into a base of plain weights; in float32 if a ``dtype`` is asked for."""
    part: Any = saved_part(model)[0]
    kinds = {config.peft_type.value for config in part.peft_config.values()}
    if not is_peft_model(part):
        raise ZOError(
            f"adapters of the kind {', '.join(sorted(kinds))} are merged after they are loaded with peft: save the "
            "model, and export its folder with --format merged"
        )
    for name, module in layers.items():
        if not _is_tied_by_peft(module):
            _check_not_tied(model, name, module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dtype is not None:
                part.float()
            merged = part.merge_and_unload(safe_merge=True)
    except (AttributeError, ValueError, NotImplementedError, TypeError, RuntimeError) as error:
        raise ZOError(
            f"peft cannot merge adapters of the kind {', '.join(sorted(kinds))} ({first_line(error)}): "
            "export the adapters on their own with --format adapters"
        ) from error
    _forget_adapters(merged)


def _is_tied_by_peft(module: Any) -> bool:
    """Whether peft itself keeps the tied weights of an adapted layer equal: of new tokens' rows it does."""
    return hasattr(module, "token_indices")
