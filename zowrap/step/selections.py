"""Named selections of what moves: ``trainable="norms"`` and its like, found by the roles of modules.

A role is told by what modules are, and not by one family's names: a norm by its class, a value projection by its
attribute in an attention module, a layer by its number in the largest numbered container.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zowrap.errors import Option, ZOError
from zowrap.names import SELECTIONS
from zowrap.step.blocks import layer_number
from zowrap.step.parameters import TrainableSpec, canonical_name, matches

_LAST = re.compile(r"^last:(.*)$")
_VALUE = {"v", "value", "values", "wv"}
# One matrix that makes queries and keys, too.
_FUSED = {"qkv", "kv", "wqkv", "qkvz", "query_key_value", "c_attn", "in_proj_weight", "in_proj_bias"}


def describe(spec: TrainableSpec) -> list[str]:
    """Describe the named selections among ``trainable``, one sentence each."""
    found = []
    for word in _words(spec):
        if word in SELECTIONS:
            found.append(f"{word}: {SELECTIONS[word]}")
        elif (match := _LAST.match(word)) is not None:
            layers = "last layer" if match[1] == "1" else f"last {match[1]} layers"
            found.append(f"{word}: {SELECTIONS['last:N'].replace('last N layers', layers)}")
    return found


def expand(model: nn.Module, spec: TrainableSpec, adapters: bool = False) -> TrainableSpec:
    """Replace named selections among ``trainable`` by patterns of the names that they stand for in this model.

    Args:
        adapters: the model has adapters: of the layers and projections that a selection names, only those and what
            else has ``requires_grad`` move.

    Raises:
        ZOError: the model has nothing of that role, a module of that name, or fewer layers than ``last:N`` asks for.
    """
    if not any(word in SELECTIONS or _LAST.match(word) for word in _words(spec)):
        return spec
    roles = _Roles(model, adapters)
    patterns: list[str] = []
    for word in _words(spec):
        if word in SELECTIONS or _LAST.match(word):
            if any(matches(word, canonical_name(each.name)) for each in roles.parameters):
                raise ZOError(
                    Option("trainable", word),
                    f" is a named selection ({SELECTIONS[word]}), and this model has a module of that name: write "
                    f"'*.{word}.*' for the module",
                )
            patterns += [f"^{re.escape(name)}$" for name in roles.find(word)]
        else:
            patterns.append(word)
    return patterns


def _words(spec: TrainableSpec) -> list[str]:
    if not isinstance(spec, Sequence):
        return []
    return [word for word in ([spec] if isinstance(spec, str) else spec) if isinstance(word, str)]


@dataclass(frozen=True)
class _Named:
    """A parameter of the model: the parts of its name, and the module that owns it."""

    name: str
    parts: tuple[str, ...]
    owner: nn.Module
    tensor: Tensor


class _Roles:
    """The roles of a model's parameters."""

    def __init__(self, model: nn.Module, adapters: bool) -> None:
        self.model, self.adapters = model, adapters
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = [
            _Named(name, tuple(name.split(".")), self.modules[name.rpartition(".")[0]], tensor)
            for name, tensor in model.named_parameters(remove_duplicate=False)
        ]

    def find(self, word: str) -> list[str]:
        """Canonical names of the parameters that a selection stands for."""
        finders: dict[str, Callable[[], list[_Named]]] = {
            "norms": lambda: [each for each in self.parameters if is_norm(each.owner)],
            "biases": lambda: [each for each in self.parameters if re.search(r"(^|_)bias$", each.parts[-1])],
            "values": self._values,
            "late-values": self._late_values,
        }
        found = finders[word]() if word in finders else self._last(word)
        if not found:
            others = [name for name in finders if name != word and finders[name]()]
            others += ["last:N"] if self._stack() is not None else []
            raise ZOError(
                Option("trainable", word),
                f" finds none of its weights ({SELECTIONS[word]}) in this model, which has: "
                f"{', '.join(others) or 'none of the named selections, so give name patterns'}",
            )
        if self.adapters and word not in ("norms", "biases"):
            found = [each for each in found if each.tensor.requires_grad]
            if not found:
                raise ZOError(Option("trainable", word), f" ({SELECTIONS.get(word, word)}): no adapter lies there")
        return list(dict.fromkeys(canonical_name(each.name) for each in found))

    # --- value projections ----------------------------------------------------------------------------------------

    def _values(self) -> list[_Named]:
        for wanted in (_makes_values, _makes_values_too):
            found = [each for each in self.parameters if any(self._in_attention(each, wanted))]
            if found:
                return found
        return []

    def _in_attention(self, each: _Named, wanted: Callable[[str], bool]) -> Iterator[bool]:
        """For each part of the name that ``wanted`` is true of: whether it belongs to an attention module."""
        for depth, part in enumerate(each.parts):
            if wanted(part):
                parent = type(self.modules[".".join(each.parts[:depth])]).__name__
                yield "att" in parent.lower() or (depth > 0 and "att" in each.parts[depth - 1].lower())

    def _late_values(self) -> list[_Named]:
        found, stack = self._values(), self._stack()
        if stack is None:
            return []
        late = stack.numbers[len(stack.numbers) // 2 :]
        return [each for each in found if stack.holds(each.name, late)]

    # --- the last layers ------------------------------------------------------------------------------------------

    def _last(self, word: str) -> list[_Named]:
        asked, stack = word.partition(":")[2], self._stack()
        if not asked.isdecimal() or int(asked) < 1:
            raise ZOError(Option("trainable", word), " needs a number of layers from 1, such as last:2")
        if stack is None:
            raise ZOError(Option("trainable", word), " found no numbered layers in this model: give name patterns")
        if int(asked) > len(stack.numbers):
            raise ZOError(
                Option("trainable", word), f": the model has {len(stack.numbers)} layers in {stack.names[-1]}"
            )
        last = stack.numbers[-int(asked) :]
        after = tuple(f"{name}." for name in self._after(stack))
        tied = {id(m.weight) for m in self.modules.values() if isinstance(m, nn.Embedding)}
        return [
            each
            for each in self.parameters
            if stack.holds(each.name, last) or (each.name.startswith(after) and id(each.tensor) not in tied)
        ]

    def _stack(self) -> _Stack | None:
        """The numbered containers with the most weights: of several stacks, a later one where they are equal.

        Containers side by side with the same numbers are one stack: XLM has one for each part of a layer.
        """
        numbers: dict[str, set[int]] = {}
        sizes: dict[str, int] = {}
        for each in self.parameters:
            if (place := layer_number(each.name)) is not None and not isinstance(each.owner, nn.Embedding):
                numbers.setdefault(place[0], set()).add(place[1])
                sizes[place[0]] = sizes.get(place[0], 0) + each.tensor.numel()
        stacks: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, found in numbers.items():
            if len(found) > 1:
                stacks.setdefault((name.rpartition(".")[0], tuple(sorted(found))), []).append(name)
        if not stacks:
            return None
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            stacks = {key: names for key, names in stacks.items() if "decoder" in key[0]} or stacks
        lists = {key: names for key, names in stacks.items() if isinstance(self.modules[names[0]], nn.ModuleList)}
        stacks = lists or stacks  # a head may be an nn.Sequential
        (_, layers), names = max(reversed(stacks.items()), key=lambda stack: sum(sizes[name] for name in stack[1]))
        return _Stack(tuple(names), layers)

    def _after(self, stack: _Stack) -> Iterator[str]:
        """The modules that follow the layers: final norms, poolers and heads, in the modules that hold the stack.

        They are registered after it; OPT's final norm is before it.
        """
        parts = stack.names[-1].split(".")
        for depth, inside in enumerate(parts):
            holder, passed = ".".join(parts[:depth]), False
            for name, child in self.modules[holder].named_children():
                full = f"{holder}.{name}" if holder else name
                if name == inside:
                    passed = True
                    continue
                follows = passed and not _embeds(name, child)
                layers = any(isinstance(each, nn.ModuleList) and len(each) > 1 for each in child.modules())
                if not layers and (follows or (is_norm(child) and "final" in name)):
                    yield full


@dataclass(frozen=True)
class _Stack:
    """The numbered containers of the layers, and the numbers of these."""

    names: tuple[str, ...]
    numbers: Sequence[int]

    def holds(self, name: str, numbers: Sequence[int]) -> bool:
        """Whether a parameter lies in one of these layers."""
        place = layer_number(name)
        return place is not None and place[0] in self.names and place[1] in numbers


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises; every implementation says so in the name of its class."""
    return "norm" in type(module).__name__.lower()


def _embeds(name: str, module: nn.Module) -> bool:
    """Whether a module that is registered after the layers makes their inputs all the same."""
    of_embeddings = "embedding" in name and ("layernorm" in name or "layer_norm" in name)
    return isinstance(module, nn.Embedding) or name.startswith("embed_") or of_embeddings


def _makes_values(part: str) -> bool:
    words = set(part.lower().split("_"))
    return bool(words & _VALUE) and not words & {"key", "query"}


def _makes_values_too(part: str) -> bool:
    return part.lower() in _FUSED or bool(set(part.lower().split("_")) & _FUSED)
