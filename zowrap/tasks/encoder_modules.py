"""Compute what follows the transformer in a sentence encoder: pooling, dense layers, norms.

Each module reads and writes entries of one dictionary, as in sentence-transformers: ``token_embeddings``
``[rows, length, width]``, ``sentence_embedding`` ``[rows, width]`` and ``attention_mask`` ``[rows, length]``, padded on
the right. All is computed in float32. A module with weights is saved in a file of its own
(:func:`zowrap.storage.save.separate_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Features = dict[str, Tensor]
TOKENS, SENTENCE, MASK = "token_embeddings", "sentence_embedding", "attention_mask"


# --- pooling: token embeddings float32 [rows, length, width] and mask float32 [rows, length] → [rows, width] ----------


def _first(tokens: Tensor, mask: Tensor) -> Tensor:
    return _pick(tokens, mask.argmax(1))  # the first after a prompt that is left out


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype)
    return _pick(tokens * mask.unsqueeze(-1), (mask * positions).argmax(1))


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index.view(-1, 1, 1).expand(-1, 1, tokens.shape[2])).squeeze(1)


def _largest(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return _sum(tokens, mask) / mask.sum(1, keepdim=True).clamp_min(1e-9)


def _mean_by_root(tokens: Tensor, mask: Tensor) -> Tensor:
    return _sum(tokens, mask) / mask.sum(1, keepdim=True).clamp_min(1e-9).sqrt()


def _mean_by_position(tokens: Tensor, mask: Tensor) -> Tensor:
    return _mean(tokens, mask * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype))


def _sum(tokens: Tensor, mask: Tensor) -> Tensor:
    return (tokens * mask.unsqueeze(-1)).sum(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}


class Pooling(nn.Module):
    """Pool the embeddings of a text's tokens into one vector, or several that are joined.

    Args:
        modes: names of :data:`POOLINGS`, in the order in which their vectors are joined.
        skipped: the number of tokens at the beginning of each text that are left out (a prompt's).
    """

    def __init__(self, modes: Sequence[str], skipped: int = 0) -> None:
        super().__init__()
        self.modes, self.skipped = tuple(modes), skipped

    def forward(self, features: Features) -> Features:
        tokens, mask = features[TOKENS], features[MASK].to(features[TOKENS].dtype)
        if self.skipped:
            mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= self.skipped).to(mask.dtype)
        found = [self._pool(mode, tokens, mask) for mode in self.modes]
        return {**features, SENTENCE: found[0] if len(found) == 1 else torch.cat(found, dim=-1)}

    def _pool(self, mode: str, tokens: Tensor, mask: Tensor) -> Tensor:
        if mode == "cls" and not self.skipped:
            return tokens[:, 0]
        return POOLINGS[mode](tokens, mask)


class Normalize(nn.Module):
    """Scale vectors to length 1."""

    def __init__(self, read: str = SENTENCE, written: str | None = None) -> None:
        super().__init__()
        self.read, self.written = read, written or read

    def forward(self, features: Features) -> Features:
        return {**features, self.written: F.normalize(features[self.read], dim=-1)}


class Dense(nn.Module):
    """A linear layer and an activation, with a residual connection if asked.

    The names of its parameters are those of sentence-transformers' file.

    Attributes:
        separate_file: the file that its weights are saved in.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        file: str,
        bias: bool = True,
        activation: nn.Module | None = None,
        read: str = SENTENCE,
        written: str | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation_function, self.read, self.written = activation or nn.Tanh(), read, written or read
        self.adds_input = residual
        if residual and inputs != outputs:
            self.residual = nn.Linear(inputs, outputs, bias=False)
        self.separate_file = file

    def forward(self, features: Features) -> Features:
        given = features[self.read]
        out = self.activation_function(self.linear(given))
        if self.adds_input:
            out = out + (self.residual(given) if hasattr(self, "residual") else given)
        return {**features, self.written: out}


class LayerNorm(nn.Module):
    """A layer norm of the sentence's vector; ``separate_file`` as in :class:`Dense`."""

    def __init__(self, width: int, file: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.separate_file = file

    def forward(self, features: Features) -> Features:
        return {**features, SENTENCE: self.norm(features[SENTENCE])}


class EncoderModules(nn.Module):
    """What follows the transformer, in order: float32 hidden states ``[rows, length, width]`` → ``[rows, width]``.

    Args:
        modules: of this file; one of them is a :class:`Pooling`.
        cut: the number of leading entries of the vector that count; None for all.
        documents: the JSON files that make the saved model's folder a sentence encoder: path → content.
    """

    def __init__(
        self, modules: Sequence[nn.Module], cut: int | None = None, documents: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        # Not a list: what has a number for a name counts as one of the layers that are compiled once for all.
        self.steps = nn.ModuleDict({f"step_{i}": each for i, each in enumerate(modules)})
        self.cut = cut
        self.folder_documents = dict(documents or {})

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        features = {TOKENS: hidden, MASK: mask}
        for step in self.steps.values():
            features = step(features)
        vector = features[SENTENCE]
        return vector if self.cut is None else vector[:, : self.cut]
