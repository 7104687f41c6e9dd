"""Merge LoRA adapters into their base, quantised or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.quant.layers import Int8Linear, Lowered
from zowrap.quant.lowering import plain_layer

_SAVED_MODULE = "ModulesToSaveWrapper"  # peft's wrapper around a module that is saved with the adapters


def lora_delta(module: Any, adapter: str) -> Tensor:
    """The matrix that one adapter adds to its layer's weight: float32 ``[outputs, inputs]``."""
    product = module.lora_B[adapter].weight.float() @ module.lora_A[adapter].weight.float()
    return product * module.scaling[adapter]


@torch.no_grad()
def merge(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Merge LoRA adapters into their base and remove them from ``model``.

    An 8-bit layer is dequantised, changed and quantised again.

    Args:
        model: with its quantised layers lowered.
        dtype: makes layers with an adapter plain layers of this dtype instead.

    Returns:
        For each merged layer ‖W_new − (W + BA)‖ / ‖BA‖, the relative error that rounding makes in the adapter.

    Raises:
        ZOError: there are no adapters, they are not plain LoRA, or the base is 4-bit and ``dtype`` is None. Nothing is
            merged then.
    """
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for name, module in found:
        _check_mergeable(model, name, module, dtype)
    if not found:
        raise ZOError("there are no adapters to merge")
    errors: dict[str, float] = {}
    for name, module in found:
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
    for module in model.modules():  # otherwise transformers would still save only adapters
        if module.__dict__.pop("_hf_peft_config_loaded", False):
            module.__dict__.pop("peft_config", None)
    return errors


def _check_mergeable(model: nn.Module, name: str, module: Any, dtype: torch.dtype | None) -> None:
    base = module.base_layer
    for other, holder in model.named_modules():
        if holder is not base and any(each is base.weight for each in holder._parameters.values()):
            raise ZOError(
                f"the weight of {name} is tied to that of {other}, which merging would change as well: export the "
                "adapters on their own with --format adapters"
            )
    for adapter in module.active_adapters:
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or getattr(module, "use_dora", {}).get(adapter):
            raise ZOError(f"the adapter of {name} is not plain LoRA (DoRA or another variant): it cannot be merged")
        if adapter not in module.lora_A or getattr(module, "lora_bias", {}).get(adapter):
            raise ZOError(f"the adapter of {name} is not a product of two matrices: it cannot be merged")
    if not isinstance(base, nn.Linear | Lowered):
        raise ZOError(f"{name} is a {type(base).__name__}, and adapters can only be merged into linear layers")
    if isinstance(base, Lowered) and not isinstance(base, Int8Linear) and dtype is None:
        few = "4-bit" in base.scheme
        why = "4 bits cannot hold the result" if few else "only bitsandbytes' 8-bit weights can be quantised again"
        raise ZOError(
            f"adapters cannot be merged into {name}, which is {base.scheme}: {why}. Merge them into plain weights with "
            "--format bf16 or fp32"
        )
