"""Select the tensors that move: names, ties and patterns.

A tunable parameter is a *storage*, not a module attribute: tied weights (an embedding that is also the output head)
are one parameter with one id, one direction and one update. Its canonical name is the first state-dict name of that
storage with wrapper and adapter prefixes removed, so the noise does not depend on how the model was wrapped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zowrap.errors import Option, ZOError
from zowrap.names import SELECTIONS
from zowrap.numerics.noise import parameter_id

TrainableSpec = Sequence[str] | str | Callable[[str, Tensor], bool] | None

# Prefixes that wrappers add in front of a model's own names: PEFT, torch.compile, DataParallel.
_WRAPPERS = re.compile(r"^(base_model\.model|_orig_mod|module)\.")
# An adapter inside another one (of a second tensor of a module) keeps its place, else both would have one name.
_ADAPTERS = re.compile(r"\.(base_layer(?!\.lora_)|default|modules_to_save\.default|original_module)(?=\.|$)")


@dataclass(frozen=True)
class Parameter:
    """One tunable storage.

    Attributes:
        name: canonical name.
        names: every state-dict name of the storage in the wrapped model, the first one first.
        tensor: the tensor that moves, in place.
        id: signed 64-bit noise id, a hash of ``name``.
        scale: float32 ``[rows]``, of a quantised weight: the scales that its integer codes are multiples of, or that
            its logarithms of scales are relative to. Else None.
    """

    name: str
    names: tuple[str, ...]
    tensor: Tensor
    id: int
    scale: Tensor | None = None

    @property
    def codes(self) -> bool:
        """Whether the tensor holds integer codes, see :mod:`zowrap.numerics.codes`."""
        return not self.tensor.is_floating_point()

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


def is_asked_for(spec: TrainableSpec, name: str, tensor: Tensor) -> bool:
    """Whether ``trainable`` asks for the parameter of that canonical name."""
    if spec is None:
        return tensor.requires_grad
    if callable(spec):
        return bool(spec(name, tensor))
    return any(matches(pattern, name) for pattern in ([spec] if isinstance(spec, str) else spec))


def matches(pattern: str, name: str) -> bool:
    """Whether a name pattern names a parameter, or a module that holds it.

    ``layers.1`` is layer 1 and not layer 10; ``*``, ``?`` and ``[…]`` are the shell's; a pattern with any of
    ``^ $ ( ) | \\ + {`` is a regular expression, searched.

    Raises:
        ZOError: not a pattern.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ZOError(f"names are chosen by patterns such as 'layers.*.mlp.*' (got {pattern!r})")
    if any(c in pattern for c in "^$()|\\+{"):
        try:
            return re.search(pattern, name) is not None
        except re.error as error:
            raise ZOError(f"{pattern!r} is not a regular expression: {error}") from None
    return any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def check_patterns(trainable: TrainableSpec, known: Sequence[str]) -> None:
    """Raise :class:`ZOError` unless each pattern matches one of the ``known`` canonical names; a predicate passes."""
    if trainable is None or callable(trainable):
        return
    if not isinstance(trainable, Sequence):
        raise ZOError(f"trainable is name patterns or a function of (name, tensor), not {trainable!r}")
    for pattern in [trainable] if isinstance(trainable, str) else trainable:
        if not any(matches(pattern, name) for name in known):
            raise ZOError(
                "nothing is left to tune by ",
                Option("trainable", pattern),
                f": it matches none of the model's {len(known)} "
                f"parameters (for example {known[0] if known else 'none at all'}) and is none of the named selections "
                f"({', '.join(SELECTIONS)})",
            )


def select(model: nn.Module, trainable: TrainableSpec = None) -> list[Parameter]:
    """The tunable parameters of ``model``, in state-dict order, ties merged.

    Args:
        model: any module. Without ``trainable``, what moves is what has ``requires_grad`` (so a PEFT model moves its
            adapters and keeps its base).
        trainable: name patterns (see :func:`matches`), each of which must match something, or a predicate
            ``(name, tensor) -> bool``.

    Raises:
        ZOError: nothing is left to tune, a pattern matches nothing, or a selected tensor is not floating point.
    """
    by_storage: dict[tuple, list[str]] = {}
    ties: dict[tuple, list[Tensor]] = {}
    tensor: Tensor
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if ".original_module." in name:  # PEFT keeps what modules_to_save replaced; it takes no part in the loss
            continue
        key = _place(tensor)
        by_storage.setdefault(key, []).append(name)
        ties.setdefault(key, []).append(tensor)
    check_patterns(trainable, [canonical_name(n) for names in by_storage.values() for n in names])
    chosen: list[Parameter] = []
    scattered: list[list[Tensor]] = []
    for key, names in by_storage.items():
        tensor, name = ties[key][0], canonical_name(names[0])
        if not any(is_asked_for(trainable, canonical_name(n), tensor) for n in names):
            continue
        if not tensor.is_floating_point():
            if trainable is None:
                continue
            raise ZOError(f"{name} holds {tensor.dtype} values: only floating-point tensors can be tuned this way")
        chosen.append(Parameter(name, tuple(names), tensor, parameter_id(name)))
        scattered += [] if tensor.is_contiguous() else [ties[key]]
    if not chosen:
        asked = (
            "trainable matches none of the model's parameters" if trainable is not None else "every parameter is frozen"
        )
        example = next((canonical_name(n[0]) for n in by_storage.values()), "none at all")
        raise ZOError(f"nothing is left to tune: {asked} (the model has {len(by_storage)}, for example {example})")
    _check_devices(chosen)
    _check_overlaps(chosen)
    if len({p.id for p in chosen}) != len(chosen):
        raise ZOError("two tunable parameters share one canonical name: give the adapters distinct names")
    for tied in scattered:
        data = tied[0].data.contiguous()
        for tensor in tied:  # two objects on one memory stay on one
            tensor.data = data
    return chosen


def _place(tensor: Tensor) -> tuple:
    """Equal for two names of one tensor: where its elements lie."""
    if not tensor.numel() or tensor.is_meta or is_traceable_wrapper_subclass(tensor):  # which has no memory of its own
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _check_devices(parameters: Sequence[Parameter]) -> None:
    devices = sorted({str(p.tensor.device) for p in parameters})
    if len(devices) > 1:
        raise ZOError(f"the tunable parameters lie on several devices ({', '.join(devices)}): use one")


def _check_overlaps(parameters: Sequence[Parameter]) -> None:
    """Two parameters that share memory without being the same tensor would get two directions and two updates."""
    spans = []
    for p in parameters:
        if p.tensor.numel() and not p.tensor.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(p.tensor.shape, p.tensor.stride(), strict=True))
            start = p.tensor.data_ptr()
            spans.append((start, start + (last + 1) * p.tensor.element_size(), p.name))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise ZOError(
                f"{first} and {second} share memory without being the same tensor (a view or a transpose): untie them, "
                f"or leave one out of trainable"
            )


def hash_shapes(parameters: Sequence[Parameter]) -> str:
    """Hash the names and shapes of what moves: with the seed, all that its noise depends on. 16 hexadecimal digits."""
    text = "\n".join(f"{p.name} {tuple(p.tensor.shape)}" for p in parameters)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_shapes_and_dtypes(parameters: Sequence[Parameter]) -> str:
    """Hash the names, shapes and dtypes of what moves: a run stays in the dtypes it began with, as they set its
    rounding. 16 hexadecimal digits.
    """
    text = json.dumps([[p.name, list(p.tensor.shape), str(p.tensor.dtype)] for p in parameters])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count(parameters: Sequence[Parameter]) -> int:
    """Number of tunable elements d."""
    return sum(p.tensor.numel() for p in parameters)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
