"""LoRA on a quantised base, through ``peft``: adding adapters, and merging them into the base on export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zowrap.errors import ZOError
from zowrap.quant.linear import Int8Linear, Lowered

RANK, ALPHA = 8, 16  # peft's own defaults are 8 and 8; twice the rank is what TRL's scripts give


def present(model: nn.Module) -> bool:
    """Whether the model has LoRA or other adapters of ``peft``."""
    return any(
        hasattr(module, "base_layer") and "lora" in type(module).__module__ for module in model.modules()
    ) or any(type(module).__name__.startswith("PeftModel") for module in model.modules())


def settings(rank: int, alpha: int, targets: set[str]) -> Any:
    """The ``LoraConfig`` of adapters on the layers whose names end in ``targets``.

    Raises:
        ZOError: peft is not installed, or a number out of range.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ZOError("adapters need peft: pip install 'zowrap[peft]'") from error
    if rank < 1 or alpha < 1:
        raise ZOError(f"--lora-r and --lora-alpha must be at least 1, got {rank} and {alpha}")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets), lora_dropout=0.0)


def attach(
    model: nn.Module, rank: int = RANK, alpha: int = ALPHA, targets: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Put fresh adapters on the quantised linear layers of a model, in place: they add nothing yet, and alone move.

    ``model`` may be lowered; its layers then are peft's linear layers around lowered ones. One factor of each adapter
    is random, drawn by ``seed``.

    Raises:
        ZOError: peft is not installed, or no layer has a target's name.
    """
    from zowrap.quant.lowering import raised

    part = _pretrained(model)
    config = settings(rank, alpha, set(targets) if targets else _targets(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with raised(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if hasattr(part, "add_adapter"):
                part.add_adapter(config)  # type: ignore[operator]
            else:
                from peft import inject_adapter_in_model

                inject_adapter_in_model(config, part)
    except ValueError as error:
        raise ZOError(str(error).splitlines()[0]) from error


def _pretrained(model: nn.Module) -> nn.Module:
    """The ``transformers`` model inside what only wraps it, which knows how to save adapters."""
    from zowrap.export import saved_part

    return saved_part(model)[0]


def _targets(model: nn.Module) -> set[str]:
    """Last parts of the names of the linear layers within the numbered layers of a model, quantised or not."""
    linear = (nn.Linear, Lowered)
    names = {
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, linear) and re.search(r"\.\d+\.", n)
    }
    names |= {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if not names and isinstance(m, linear)}
    if not names:
        raise ZOError("there is no linear layer to put adapters on: name some with --lora-target-modules")
    return names


def merge_from(model: nn.Module, folder: Any) -> dict[str, float]:
    """Merge the adapters in a folder into their base; see :func:`merge`. Quantised layers are lowered in between."""
    from peft import PeftModel

    from zowrap.quant.lowering import lower, raise_back

    around = PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
    lower(around)
    errors = merge(around)
    raise_back(around)
    return errors


def lora_change(module: Any, adapter: str) -> torch.Tensor:
    """float32 ``[outputs, inputs]``: what one adapter adds to its layer's weight."""
    product = module.lora_B[adapter].weight.float() @ module.lora_A[adapter].weight.float()
    return product * module.scaling[adapter]


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Merge LoRA into its base: into 8 bits by dequantising, adding and requantising. ``model`` then has no adapters.

    Args:
        model: its quantised layers lowered.

    Returns:
        For each merged layer ‖W_new − (W + BA)‖ / ‖BA‖: how much of the adapter the 8 bits could not hold.

    Raises:
        ZOError: a 4-bit base, or no adapters.
    """
    errors: dict[str, float] = {}
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if not hasattr(module, "lora_A") or base is None:
            continue
        change = torch.stack([lora_change(module, adapter) for adapter in module.active_adapters]).sum(0)
        if isinstance(base, Int8Linear):
            errors[name] = base.requantize(change)
        elif isinstance(base, nn.Linear):
            wanted = base.weight.float() + change
            base.weight.copy_(wanted)
            errors[name] = float((base.weight.float() - wanted).norm() / change.norm().clamp(min=1e-30))
        else:
            raise ZOError(f"{name} is a {type(base).__name__}: adapters are merged into 8, 16 or 32 bits alone")
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._modules[last] = base
    if not errors:
        raise ZOError("there are no adapters to merge")
    return errors
