"""Attach LoRA to a quantised base through ``peft``, and select the parameters that move."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line, need_package
from zowrap.quant.layers import Lowered
from zowrap.quant.lowering import fresh_weights, lowered_layers, original_layers
from zowrap.step.parameters import Parameter, TrainableSpec, canonical_name, check_patterns, is_asked_for, select

RANK, ALPHA = 8, 16  # peft's own defaults are 8 and 8; twice the rank is what TRL's scripts give


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has LoRA or other adapters of ``peft``."""
    return any(
        hasattr(module, "base_layer") and "lora" in type(module).__module__ for module in model.modules()
    ) or any(type(module).__name__.startswith("PeftModel") for module in model.modules())


def lora_config(rank: int, alpha: int, targets: set[str] | str, beside: Sequence[str] = ()) -> Any:
    """Build peft's ``LoraConfig``.

    Args:
        targets: the last parts of the names of the layers to adapt; or ``"all-linear"``, or a regular expression for
            whole names.
        beside: modules that move as a whole and are saved with the adapters.

    Raises:
        ZOError: peft is not installed, or ``rank`` or ``alpha`` is below 1.
    """
    need_package("peft")
    from peft import LoraConfig

    if rank < 1 or alpha < 1:
        raise ZOError(f"--lora-r and --lora-alpha must be at least 1, got {rank} and {alpha}")
    named = targets if isinstance(targets, str) else sorted(targets)
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=named, lora_dropout=0.0, modules_to_save=list(beside) or None
    )


def attach(
    model: nn.Module, rank: int = RANK, alpha: int = ALPHA, targets: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Attach new adapters to the quantised linear layers of a model, in place; their output is 0 at first.

    Only they move, and the modules whose weights were missing from the checkpoint. ``model`` may be lowered; its
    layers are then peft's linear layers around lowered ones. One factor of each adapter is random, drawn with
    ``seed``.

    Raises:
        ZOError: peft is not installed, or no layer has the name of a target.
    """
    part, prefix = _pretrained(model)
    config = lora_config(
        rank, alpha, _peft_targets(targets) or _default_targets(model), _fresh_modules(model, part, prefix)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with original_layers(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if hasattr(part, "add_adapter"):
                part.add_adapter(config)  # type: ignore[operator]
            else:
                from peft import inject_adapter_in_model

                inject_adapter_in_model(config, part)
    except ValueError as error:
        raise ZOError(first_line(error)) from error


def _pretrained(model: nn.Module) -> tuple[nn.Module, str]:
    """The ``transformers`` model inside a wrapper, which knows how to save adapters, and its name's prefix."""
    from zowrap.step.pretrained import saved_part

    return saved_part(model)


def _peft_targets(targets: Sequence[str] | None) -> set[str] | str | None:
    """``targets`` in peft's form: a set of plain names, or a single string for ``all-linear`` or a regular expression.

    Each target may be several plain names separated by commas.
    """
    lists = [each.split(",") if re.fullmatch(r"[\w.,-]+", each) else [each] for each in targets or ()]
    targets = [name for each in lists for name in each if name]
    if targets and len(targets) == 1 and (targets[0] == "all-linear" or re.search(r"[\\^$()|*+\[]", targets[0])):
        return targets[0]
    return set(targets) if targets else None


def _default_targets(model: nn.Module) -> set[str]:
    """The last parts of the names of all linear layers, quantised or not, within the model's numbered layers."""
    linear = (nn.Linear, Lowered)
    names = {
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, linear) and re.search(r"\.\d+\.", n)
    }
    names |= {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if not names and isinstance(m, linear)}
    if not names:
        raise ZOError("the model has no linear layer to adapt: name other layers with --lora-target-modules")
    return names


def _fresh_modules(model: nn.Module, part: nn.Module, prefix: str) -> list[str]:
    """The names within ``part`` of the modules with a weight that was missing from the checkpoint."""
    fresh = fresh_weights(model)
    found = []
    for name, module in part.named_modules():
        own = (canonical_name(f"{prefix}{name}.{each}") for each, _ in module.named_parameters(recurse=False))
        if name and any(each in fresh for each in own):
            found.append(name)
    return found


# --- selecting what moves -------------------------------------------------------------------------------------------


def select_parameters(model: nn.Module, trainable: TrainableSpec) -> list[Parameter]:
    """Select the parameters of a model with adapters that move, in state-dict order. All are saved with the adapters.

    Without ``trainable``, these are the parameters with ``requires_grad`` and those missing from the checkpoint. A
    module that ``trainable`` names outside the adapters becomes one of peft's ``modules_to_save``. Quantised weights
    never move here.

    Raises:
        ZOError: nothing is left to tune, or a parameter cannot be saved with the adapters.
    """
    fresh = fresh_weights(model)
    fixed = {canonical_name(f"{name}.weight") for name in lowered_layers(model)}
    names = {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    check_patterns(trainable, sorted(names - fixed))

    def chosen(name: str, tensor: Tensor) -> bool:
        return name not in fixed and (is_asked_for(trainable, name, tensor) or (trainable is None and name in fresh))

    spec = None if trainable is None and not fresh else chosen
    found = select(model, spec)
    part, prefix = _pretrained(model)
    config = _adapter_config(part)
    lost = [p for p in found if config is not None and not _is_saved(p, config)]
    for parameter in lost:
        _save_with_adapters(part, prefix, parameter, config)
    return select(model, spec) if lost else found


def _adapter_config(part: nn.Module) -> Any:
    """The adapters' configuration, if the model is saved as its adapters only; None if all its weights are saved."""
    adapters = getattr(part, "peft_config", None)
    alone = type(part).__name__.startswith("PeftModel") or getattr(part, "_hf_peft_config_loaded", False)
    if not isinstance(adapters, dict) or not adapters or not alone:
        return None
    config = next(iter(adapters.values()))
    return None if getattr(config, "is_prompt_learning", False) else config


def _is_saved(parameter: Parameter, config: Any) -> bool:
    """Whether peft saves a parameter: of an adapter, of a module to save, or a bias that the configuration includes."""
    name, biases = parameter.names[0], getattr(config, "bias", "none")
    bias = name.endswith("bias") and (biases == "all" or (biases == "lora_only" and ".base_layer." in name))
    return bias or ".modules_to_save." in name or f"{config.peft_type.value.lower()}_" in name


def _save_with_adapters(part: nn.Module, prefix: str, parameter: Parameter, config: Any) -> None:
    """Add the parameter's module to those that peft saves with the adapters.

    Raises:
        ZOError: the parameter is tied, or its module has an adapter or other modules inside.
    """
    from peft.utils import ModulesToSaveWrapper

    where = parameter.names[0].removeprefix(prefix).rpartition(".")[0]
    module = part.get_submodule(where)
    if isinstance(module, ModulesToSaveWrapper):
        return
    if not where or len(parameter.names) > 1 or ".base_layer" in f".{where}" or any(True for _ in module.children()):
        raise ZOError(
            f"{parameter.name} cannot be saved with the adapters, because it is tied or belongs to a layer that has an "
            "adapter: leave it out of trainable, which may name '*lora_*' and whole modules such as norms"
        )
    adapter = next(iter(part.peft_config))  # type: ignore[arg-type, call-overload]
    around = ModulesToSaveWrapper(module, adapter)
    around.set_adapter(adapter)
    part.set_submodule(where, around)
    config.modules_to_save = [*(config.modules_to_save or ()), re.sub(r"^base_model\.model\.", "", where)]
