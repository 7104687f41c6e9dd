"""Truncate token lists and pad them into batches.

Padding is decided by length, never by token id: where the padding token is also the end-of-text token (GPT-2, many
Llamas), an end-of-text label must remain a label.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zowrap.loss.module import IGNORED

Example = dict[str, Any]


@dataclass
class Examples(Dataset):
    """Tokenised rows: ``{"input_ids": [int], "labels": int or [int]}`` each; some with ``"token_type_ids"``.

    Attributes:
        items: the examples in file order, without the dropped ones.
        truncated: the number of rows that were longer than allowed.
        dropped: the number of rows left out because they have nothing to learn from (no label token).
        rows: for each item, the number of its row in the data file, from 0.
        lost_turns: the number of the assistant's turns that a chat template keeps from being learned.
        lengths: for each item, its number of tokens.
    """

    items: list[Example]
    truncated: int = 0
    dropped: int = 0
    rows: list[int] = field(default_factory=list)
    lost_turns: int = 0
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(item["input_ids"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    def identity(self) -> dict[str, Any]:
        """What tells these examples from others, as JSON types: their number and a digest of all tokens and labels."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(item, sort_keys=True).encode())
        return {"examples": len(self.items), "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Collator:
    """Pads examples into one batch, to the longest of them or to the next of some fixed lengths.

    Returns ``input_ids``, ``attention_mask`` and, if the examples have them, ``token_type_ids``, int64
    ``[batch, length]``, and ``labels``, int64 ``[batch]`` for classes or ``[batch, length]`` with -100 at
    positions without a label.

    Attributes:
        pad_id: token id that fills ``input_ids``; the mask hides it.
        side: ``"right"``, or ``"left"`` so that every row ends at the same position.
        lengths: in ascending order; a batch is padded to the first that is long enough, so that batches have few
            shapes (:func:`even_lengths`). By default, and beyond the last, a batch is padded to its longest row.
        pad_type: what fills ``token_type_ids``.
    """

    pad_id: int
    side: str = "right"
    lengths: tuple[int, ...] = ()
    pad_type: int = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": self._pad(ids, self.pad_id),
            "attention_mask": self._pad([[1] * len(row) for row in ids], 0),
        }
        if examples and "token_type_ids" in examples[0]:
            batch["token_type_ids"] = self._pad([example["token_type_ids"] for example in examples], self.pad_type)
        if examples and "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            batch["labels"] = torch.tensor(labels) if isinstance(labels[0], int) else self._pad(labels, IGNORED)
        return batch

    def _pad(self, rows: Sequence[list[int]], fill: int) -> Tensor:
        longest = max(map(len, rows))
        length = next((length for length in self.lengths if length >= longest), longest)
        if self.side == "left":
            return torch.tensor([[fill] * (length - len(row)) + row for row in rows])
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def even_lengths(longest: int, count: int) -> tuple[int, ...]:
    """At most ``count`` lengths in even steps up to ``longest``, so that no row is padded by more than one step."""
    step = -(-longest // count)
    return (*range(step, longest, step), longest)


def truncate(ids: list[int], labels: list[int], limit: int, start_id: int | None = None) -> tuple[list[int], list[int]]:
    """Truncate a sequence to ``limit`` tokens: first the prompt from its left, then the end.

    The prompt is the leading run of ``-100`` labels. A beginning-of-text token in front of it stays, because models
    trained with one expect it.

    Args:
        ids: token ids ``[n]``.
        labels: ``[n]``, -100 at positions without a label.
        limit: the number of tokens to keep, at least 1.
        start_id: the tokenizer's beginning-of-text token, if it has one.
    """
    excess = len(ids) - limit
    if excess <= 0:
        return ids, labels
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    kept = 1 if start_id is not None and ids[0] == start_id and prompt > 0 else 0
    cut = min(excess, max(prompt - kept, 0))
    ids, labels = ids[:kept] + ids[kept + cut :], labels[:kept] + labels[kept + cut :]
    return ids[:limit], labels[:limit]


def iterate_batches(examples: Examples, collator: Collator, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield consecutive batches of ``size`` examples; the last one may be smaller."""
    for start in range(0, len(examples), size):
        yield collator(examples.items[start : start + size])
