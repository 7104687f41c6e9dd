"""Find the part of a model that ``save_pretrained`` writes and its name, and tell whether peft adapted it."""

from __future__ import annotations

from torch import nn


def saved_part(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of ``model`` that is written, and the prefix of its names within ``model``.

    A module that only wraps one ``transformers`` or PEFT model (a task around an encoder, say) and holds no tensor of
    its own is written as that model, so that ``from_pretrained`` loads it.
    """
    prefix = ""
    while not hasattr(model, "save_pretrained"):
        children = [(name, child) for name, child in model.named_children() if _is_saved_with_it(child)]
        own = [name for name in model.state_dict() if "." not in name]
        if own or len(children) != 1 or not _has_pretrained(children[0][1]):
            return model, prefix
        prefix += children[0][0] + "."
        model = children[0][1]
    return model, prefix


def _is_saved_with_it(module: nn.Module) -> bool:
    """Whether a module has parameters that no file of its own holds."""
    if hasattr(module, "separate_file"):
        return False
    own = any(parameter is not None for parameter in module._parameters.values())
    return own or any(map(_is_saved_with_it, module.children()))


def _has_pretrained(model: nn.Module) -> bool:
    return any(hasattr(child, "save_pretrained") for child in model.modules())


def _is_a(model: nn.Module, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(model).__mro__)


def _base_model(part: nn.Module) -> dict[str, str]:
    name = model_name(part)
    return {"base_model": name} if name else {}


def model_name(model: nn.Module) -> str | None:
    """The name or folder that ``model`` was loaded from, where it knows."""
    part, _ = saved_part(model)
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of ``peft``: a PEFT model, or a model with layers of peft in it."""
    return any(_is_of_peft(module) for module in model.modules())


def _is_of_peft(module: nn.Module) -> bool:
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` itself is one of peft's wrappers round a whole model."""
    return any(base.__name__ == "PeftModel" and base.__module__.startswith("peft.") for base in type(model).__mro__)
