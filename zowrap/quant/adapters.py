"""Attach LoRA through ``peft``, and select the parameters of a model with adapters of any kind that move."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line, need_package
from zowrap.quant.layers import Lowered
from zowrap.quant.lowering import fresh_weights, lowered_layers, original_layers
from zowrap.quant.schemes import other_scheme_of
from zowrap.step.parameters import Parameter, TrainableSpec, canonical_name, check_patterns, is_asked_for, select
from zowrap.step.pretrained import is_peft_model, saved_part
from zowrap.step.selections import expand

RANK, ALPHA = 8, 16  # peft's own defaults are 8 and 8; twice the rank is what TRL's scripts give


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
    part, prefix = saved_part(model)
    config = lora_config(
        rank, alpha, _peft_targets(targets) or _default_targets(part), _fresh_modules(model, part, prefix)
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
    linear = [n for n, m in model.named_modules() if _is_linear(m)]
    inside = [n for n in linear if re.search(r"(^|\.)\d+\.", n)]
    names = {n.rsplit(".", 1)[-1] for n in inside or linear}
    if not names:
        raise ZOError("the model has no linear layer to adapt: name other layers with --lora-target-modules")
    return names


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Lowered):
        return True
    return hasattr(module, "in_features") and other_scheme_of(module) is not None


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
    trainable = expand(model, trainable, adapters=True)
    fresh = fresh_weights(model)
    fixed = {canonical_name(f"{name}.weight") for name in lowered_layers(model)}
    names = {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    check_patterns(trainable, sorted(names - fixed))

    def chosen(name: str, tensor: Tensor) -> bool:
        return name not in fixed and (is_asked_for(trainable, name, tensor) or (trainable is None and name in fresh))

    spec = None if trainable is None and not fresh else chosen
    found = select(model, spec)
    part, prefix = saved_part(model)
    if not _is_saved_as_adapters(part):
        return found
    saved = _saved_tensors(part)
    lost = [p for p in found if not _is_among(p, saved, prefix)]
    if lost:  # peft looks at the base's configuration, perhaps on the hub, for whether the vocabulary was extended
        saved = _saved_tensors(part, embeddings="auto")
        lost = [p for p in lost if not _is_among(p, saved, prefix)]
    for parameter in lost:
        _save_with_adapters(part, prefix, parameter)
    return select(model, spec) if lost else found


def _is_saved_as_adapters(part: nn.Module) -> bool:
    """Whether the model is saved as its adapters alone."""
    if not isinstance(getattr(part, "peft_config", None), dict) or not part.peft_config:
        return False
    return is_peft_model(part) or bool(getattr(part, "_hf_peft_config_loaded", False))


class _Saved(NamedTuple):
    """What peft saves of a model: its tensors by identity, and their canonical names within the model's saved part."""

    tensors: set[int]
    names: set[str]


def _saved_tensors(part: Any, embeddings: Any = False) -> _Saved:
    """Ask peft which tensors it saves.

    Args:
        embeddings: whether it saves the embeddings too; ``"auto"`` if the vocabulary was extended.
    """
    from peft import get_peft_model_state_dict

    own = {**dict(part.named_parameters(remove_duplicate=False)), **dict(part.named_buffers(remove_duplicate=False))}
    saved = _Saved(set(), set())
    for name, config in part.peft_config.items():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            found = get_peft_model_state_dict(part, state_dict=own, adapter_name=name, save_embedding_layers=embeddings)
        saved.tensors.update(map(id, found.values()))
        saved.names.update(map(canonical_name, found))
        if config.is_prompt_learning:  # only the prompt that its encoder makes is saved, which is all that is used
            saved.tensors.update(map(id, part.prompt_encoder[name].parameters()))
    for layer in part.modules():  # some methods save what they compute from the tensors of their layers
        for name in (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())):
            if name in layer._modules or name in layer._parameters:
                held = getattr(layer, name)
                saved.tensors.update(map(id, held.parameters() if isinstance(held, nn.Module) else [held]))
    return saved


def _is_among(parameter: Parameter, saved: _Saved, prefix: str) -> bool:
    if id(parameter.tensor) in saved.tensors:
        return True
    return any(canonical_name(name.removeprefix(prefix)) in saved.names for name in parameter.names)


def _save_with_adapters(part: Any, prefix: str, parameter: Parameter) -> None:
    """Add the parameter's module to those that peft saves with the adapters.

    Raises:
        ZOError: the parameter is tied, its module has an adapter or other modules inside, or the adapters are a prompt.
    """
    from peft.utils import ModulesToSaveWrapper

    where = parameter.names[0].removeprefix(prefix).rpartition(".")[0]
    module = part.get_submodule(where)
    if isinstance(module, ModulesToSaveWrapper):
        return
    adapter, config = next(iter(part.peft_config.items()))
    if config.is_prompt_learning:
        raise ZOError(
            f"{parameter.name} cannot be saved with a prompt ({config.peft_type.value}), which is all that peft saves: "
            "leave it out of trainable"
        )
    if not where or len(parameter.names) > 1 or ".base_layer" in f".{where}" or any(True for _ in module.children()):
        raise ZOError(
            f"{parameter.name} cannot be saved with the adapters, because it is tied or belongs to a layer that has an "
            "adapter: leave it out of trainable, which may name '*lora_*' and whole modules such as norms"
        )
    around = ModulesToSaveWrapper(module, adapter)
    around.set_adapter(adapter)
    part.set_submodule(where, around)
    config.modules_to_save = [*(config.modules_to_save or ()), re.sub(r"^base_model\.model\.", "", where)]
