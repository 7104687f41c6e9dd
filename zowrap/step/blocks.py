"""Blocks: a partition of the tunable parameters, one block perturbed and updated per step (MeZO-BCD, 2501.19099).

``blocks="layer"`` makes one block per transformer layer, found by structure: the numbered containers of the model
(``layers.0``, ``h.3``, ``block.7`` …) are layers; parameters before the first are a block of their own, a final norm
joins the last layer, and an output head that is not tied to the embedding is a block. Every
order (:data:`zowrap.names.BLOCK_ORDERS`) is a pure function of (step, seed), so a resumed run visits the same blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from zowrap.errors import Option, ZOError
from zowrap.numerics import noise
from zowrap.step.parameters import Parameter, matches


@dataclass(frozen=True)
class Block:
    """A named set of parameters, by index into the list of tunable parameters."""

    name: str
    indices: tuple[int, ...]


def partition(parameters: Sequence[Parameter], blocks: str | Sequence[str] | None) -> list[Block]:
    """The blocks of a run.

    Args:
        blocks: ``None`` (everything at once), ``"layer"``, or name patterns, one block each, in order; what no
            pattern matches is frozen.

    Raises:
        ZOError: a pattern matches nothing, or the model has no layers to find.
    """
    if blocks is None:
        return [Block("all", tuple(range(len(parameters))))]
    if isinstance(blocks, str):
        return _by_layer(parameters)
    taken: set[int] = set()
    result = []
    for pattern in blocks:
        found = [i for i, p in enumerate(parameters) if i not in taken and matches(pattern, p.name)]
        if not found:
            raise ZOError(f"the block pattern {pattern!r} matches no tunable parameter that is still free")
        taken.update(found)
        result.append(Block(pattern, tuple(found)))
    return result


_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)(?:\.|$)")


def layer_number(name: str) -> tuple[str, int] | None:
    """The outermost numbered container that a parameter lies in, and its number there; None where there is none."""
    match = _LAYER.match(name)
    return None if match is None else (match["stack"], int(match["number"]))


def layer_names(names: Iterable[str]) -> set[str]:
    """The numbered containers that these modules or parameters lie in, the outermost of each."""
    return {match[0].rstrip(".") for match in map(_LAYER.match, names) if match}


def _by_layer(parameters: Sequence[Parameter]) -> list[Block]:
    stacks: dict[str, int] = {}
    for p in parameters:
        match = _LAYER.match(p.name)
        if match and int(match["number"]) > 0:
            stacks[match["stack"]] = stacks.get(match["stack"], 0) + p.tensor.numel()
    if not stacks:
        raise ZOError(Option("blocks", "layer"), " found no numbered layers in this model: give name patterns instead")
    groups: dict[str, list[int]] = {}
    last_layer = ""
    for i, p in enumerate(parameters):
        match = _LAYER.match(p.name)
        if match and match["stack"] in stacks:
            last_layer = f"{match['stack']}.{match['number']}"
            groups.setdefault(last_layer, []).append(i)
        elif p.tensor.ndim >= 2 or not last_layer:
            # Embeddings first, an untied head last: matrices outside the layers. Their vectors go along.
            name = "embeddings" if not last_layer else p.name.rsplit(".", 1)[0]
            groups.setdefault(name, []).append(i)
        else:
            owner = p.name.rsplit(".", 1)[0]
            groups.setdefault(owner if owner in groups else last_layer, []).append(i)
    groups = _late_norms(parameters, groups, stacks)
    return [Block(name, tuple(indices)) for name, indices in groups.items()]


def _late_norms(
    parameters: Sequence[Parameter], groups: dict[str, list[int]], stacks: dict[str, int]
) -> dict[str, list[int]]:
    """A norm that stands before the layers in the state dict but is called final belongs to the last layer."""
    first = next(iter(groups))
    layers = [name for name in groups if _LAYER.match(name + ".") and _LAYER.match(name + ".")["stack"] in stacks]  # type: ignore[index]
    if first in layers:
        return groups
    late = [
        i
        for i in groups[first]
        if parameters[i].tensor.ndim < 2 and re.search(r"final|ln_f|\.norm\.", parameters[i].name)
    ]
    groups[first] = [i for i in groups[first] if i not in late]
    groups[layers[-1]].extend(late)
    return {name: indices for name, indices in groups.items() if indices}


def active(step: int, count: int, order: str, seed: int) -> int:
    """The block of a step: a pure function of (step, seed)."""
    if count == 1:
        return 0
    sweep, position = divmod(step, count)
    if order == "ascending":
        return position
    if order == "descending":
        return count - 1 - position
    if order == "flip_flop":
        return position if sweep % 2 == 0 else count - 1 - position
    when = step if order == "random" else sweep
    keys = noise.derive_keys(seed, when, 0, torch.arange(count), noise.TAG_BLOCKS).to(torch.int64)
    ranks = keys[:, 1] * 2**32 + keys[:, 0]
    shuffled = torch.argsort(ranks, stable=True)
    return int(shuffled[0] if order == "random" else shuffled[position])
