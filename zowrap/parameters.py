"""Which tensors move: names, ties and selection.

A tunable parameter is a *storage*, not a module attribute: tied weights (an embedding that is also the output head)
are one parameter with one id, one direction and one update. Its canonical name is the first state-dict name of that
storage with wrapper and adapter prefixes removed, so the noise does not depend on how the model was wrapped.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.noise import parameter_id

TrainableSpec = Sequence[str] | str | Callable[[str, Tensor], bool] | None

# Prefixes that wrappers add in front of a model's own names: PEFT, torch.compile, DataParallel.
_WRAPPERS = re.compile(r"^(base_model\.model|_orig_mod|module)\.")
_ADAPTERS = re.compile(r"\.(base_layer|default|modules_to_save\.default|original_module)(?=\.|$)")


@dataclass(frozen=True)
class Parameter:
    """One tunable storage.

    Attributes:
        name: canonical name.
        names: every state-dict name of the storage in the wrapped model, the first one first.
        tensor: the tensor that moves, in place.
        id: signed 64-bit noise id, a hash of ``name``.
    """

    name: str
    names: tuple[str, ...]
    tensor: Tensor
    id: int

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices and not to vectors (norm gains, biases), whatever they are called."""
        return self.tensor.ndim >= 2


def canonical_name(name: str) -> str:
    """``base_model.model.model.layers.0.q_proj.lora_A.default.weight`` → ``model.layers.0.q_proj.lora_A.weight``."""
    previous = None
    while previous != name:
        previous = name
        name = _WRAPPERS.sub("", name)
    return _ADAPTERS.sub("", name)


def _matches(spec: TrainableSpec, name: str, tensor: Tensor) -> bool:
    if spec is None:
        return tensor.requires_grad
    if callable(spec):
        return bool(spec(name, tensor))
    patterns = [spec] if isinstance(spec, str) else spec
    return any(fnmatch.fnmatchcase(name, p) or re.search(p, name) is not None for p in map(_as_pattern, patterns))


def _as_pattern(pattern: str) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ZOError(f"trainable takes name patterns such as 'layers.*.mlp.*' (got {pattern!r})")
    try:
        re.compile(pattern)
    except re.error:
        return fnmatch.translate(pattern)
    return pattern


def select(model: nn.Module, trainable: TrainableSpec = None) -> list[Parameter]:
    """The tunable parameters of ``model``, in state-dict order, ties merged.

    Args:
        model: any module. Without ``trainable``, what moves is what has ``requires_grad`` (so a PEFT model moves its
            adapters and keeps its base).
        trainable: name patterns (shell style or regular expressions, matched against the canonical name) or a
            predicate ``(name, tensor) -> bool``.

    Raises:
        ZOError: nothing is left to tune, a pattern matches nothing, or a selected tensor is not floating point.
    """
    by_storage: dict[tuple, list[str]] = {}
    tensors: dict[tuple, Tensor] = {}
    tensor: Tensor
    for name, tensor in model.named_parameters(remove_duplicate=False):
        key = (
            (tensor.data_ptr(), tensor.device, tensor.shape) if tensor.numel() and not tensor.is_meta else (id(tensor),)
        )
        by_storage.setdefault(key, []).append(name)
        tensors.setdefault(key, tensor)
    chosen: list[Parameter] = []
    for key, names in by_storage.items():
        tensor, name = tensors[key], canonical_name(names[0])
        if not any(_matches(trainable, canonical_name(n), tensor) for n in names):
            continue
        if not tensor.is_floating_point():
            if trainable is None:
                continue
            raise ZOError(f"{name} holds {tensor.dtype} values: only floating-point tensors can be tuned this way")
        chosen.append(Parameter(name, tuple(names), tensor, parameter_id(name)))
    if not chosen:
        asked = (
            "trainable matches none of the model's parameters" if trainable is not None else "every parameter is frozen"
        )
        example = next((canonical_name(n[0]) for n in by_storage.values()), "none at all")
        raise ZOError(f"nothing is left to tune: {asked} (the model has {len(by_storage)}, for example {example})")
    _check_storages(chosen)
    if len({p.id for p in chosen}) != len(chosen):
        raise ZOError("two tunable parameters share one canonical name: give the adapters distinct names")
    return chosen


def _check_storages(parameters: Sequence[Parameter]) -> None:
    """One device, and no two parameters that overlap in memory without being the same tensor."""
    devices = {p.tensor.device for p in parameters}
    if len(devices) > 1:
        raise ZOError(
            f"the tunable parameters lie on several devices ({', '.join(sorted(map(str, devices)))}): use one"
        )
    for parameter in parameters:
        if not parameter.tensor.is_contiguous():
            with torch.no_grad():
                parameter.tensor.data = parameter.tensor.data.contiguous()


def count(parameters: Sequence[Parameter]) -> int:
    """Number of tunable elements d."""
    return sum(p.tensor.numel() for p in parameters)
