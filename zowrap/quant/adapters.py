"""LoRA on a quantised base, through ``peft``: adding adapters, and what moves beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line, need_package
from zowrap.quant.layers import Lowered
from zowrap.quant.lowering import fresh_weights, lowered, raised
from zowrap.step.parameters import Parameter, TrainableSpec, canonical_name, check_patterns, select, wanted

RANK, ALPHA = 8, 16  # peft's own defaults are 8 and 8; twice the rank is what TRL's scripts give


def present(model: nn.Module) -> bool:
    """Whether the model has LoRA or other adapters of ``peft``."""
    return any(
        hasattr(module, "base_layer") and "lora" in type(module).__module__ for module in model.modules()
    ) or any(type(module).__name__.startswith("PeftModel") for module in model.modules())


def settings(rank: int, alpha: int, targets: set[str] | str, beside: Sequence[str] = ()) -> Any:
    """The ``LoraConfig`` of adapters.

    Args:
        targets: last parts of the names of the layers that get one; or ``"all-linear"``, or a regular expression of
            whole names.
        beside: modules that move as a whole, and are saved with the adapters.

    Raises:
        ZOError: peft is not installed, or a number out of range.
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
    """Put fresh adapters on the quantised linear layers of a model, in place: they add nothing yet.

    They alone move, and beside them the modules whose weights the checkpoint did not have. ``model`` may be lowered;
    its layers then are peft's linear layers around lowered ones. One factor of each adapter is random, drawn by
    ``seed``.

    Raises:
        ZOError: peft is not installed, or no layer has a target's name.
    """
    part, prefix = _pretrained(model)
    config = settings(rank, alpha, _named(targets) or _targets(model), _fresh_modules(model, part, prefix))
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
        raise ZOError(first_line(error)) from error


def _pretrained(model: nn.Module) -> tuple[nn.Module, str]:
    """The ``transformers`` model inside what only wraps it, which knows how to save adapters, and its prefix."""
    from zowrap.step.pretrained import saved_part

    return saved_part(model)


def _named(targets: Sequence[str] | None) -> set[str] | str | None:
    """Targets as peft takes them: one that is no plain name is a string to peft, which then expands or searches it.

    Plain names may come with commas between them.
    """
    lists = [each.split(",") if re.fullmatch(r"[\w.,-]+", each) else [each] for each in targets or ()]
    targets = [name for each in lists for name in each if name]
    if targets and len(targets) == 1 and (targets[0] == "all-linear" or re.search(r"[\\^$()|*+\[]", targets[0])):
        return targets[0]
    return set(targets) if targets else None


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


def _fresh_modules(model: nn.Module, part: nn.Module, prefix: str) -> list[str]:
    """Names within ``part`` of the modules that hold a weight which its checkpoint did not have."""
    fresh = fresh_weights(model)
    found = []
    for name, module in part.named_modules():
        own = (canonical_name(f"{prefix}{name}.{each}") for each, _ in module.named_parameters(recurse=False))
        if name and any(each in fresh for each in own):
            found.append(name)
    return found


# --- what moves beside adapters -------------------------------------------------------------------------------------


def parameters(model: nn.Module, trainable: TrainableSpec) -> list[Parameter]:
    """What moves of a model with adapters, in state-dict order. All of it is saved with them.

    Without ``trainable``: what has ``requires_grad``, and what the checkpoint did not have. A module that is named and
    is not part of the adapters becomes one of peft's ``modules_to_save``. Quantised weights never move here.

    Raises:
        ZOError: nothing is left to tune, or what is saved has no place for a parameter that is to move.
    """
    fresh = fresh_weights(model)
    fixed = {canonical_name(f"{name}.weight") for name in lowered(model)}
    names = {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    check_patterns(trainable, sorted(names - fixed))

    def chosen(name: str, tensor: Tensor) -> bool:
        return name not in fixed and (wanted(trainable, name, tensor) or (trainable is None and name in fresh))

    spec = None if trainable is None and not fresh else chosen
    found = select(model, spec)
    part, prefix = _pretrained(model)
    config = _saved_alone(part)
    lost = [p for p in found if config is not None and not _is_saved(p, config)]
    for parameter in lost:
        _keep(part, prefix, parameter, config)
    return select(model, spec) if lost else found


def _saved_alone(part: nn.Module) -> Any:
    """The configuration of the adapters that are all that is saved of a model; None where its weights are."""
    adapters = getattr(part, "peft_config", None)
    alone = type(part).__name__.startswith("PeftModel") or getattr(part, "_hf_peft_config_loaded", False)
    if not isinstance(adapters, dict) or not adapters or not alone:
        return None
    config = next(iter(adapters.values()))
    return None if getattr(config, "is_prompt_learning", False) else config


def _is_saved(parameter: Parameter, config: Any) -> bool:
    """Whether peft writes a parameter: of an adapter, of a module to save, or a bias where the adapters say so."""
    name, biases = parameter.names[0], getattr(config, "bias", "none")
    bias = name.endswith("bias") and (biases == "all" or (biases == "lora_only" and ".base_layer." in name))
    return bias or ".modules_to_save." in name or f"{config.peft_type.value.lower()}_" in name


def _keep(part: nn.Module, prefix: str, parameter: Parameter, config: Any) -> None:
    """Make the module of a parameter one that is saved with the adapters.

    Raises:
        ZOError: it is tied, or shares its module with an adapter or with other modules.
    """
    from peft.utils import ModulesToSaveWrapper

    where = parameter.names[0].removeprefix(prefix).rpartition(".")[0]
    module = part.get_submodule(where)
    if isinstance(module, ModulesToSaveWrapper):
        return
    if not where or len(parameter.names) > 1 or ".base_layer" in f".{where}" or any(True for _ in module.children()):
        raise ZOError(
            f"{parameter.name} would move, and what is saved of a model with adapters has no place for it (a tied "
            "weight, or one of a layer that has an adapter): leave it out of trainable, which may name '*lora_*' and "
            "whole modules such as norms beside it"
        )
    adapter = next(iter(part.peft_config))  # type: ignore[arg-type, call-overload]
    around = ModulesToSaveWrapper(module, adapter)
    around.set_adapter(adapter)
    part.set_submodule(where, around)
    config.modules_to_save = [*(config.modules_to_save or ()), re.sub(r"^base_model\.model\.", "", where)]
