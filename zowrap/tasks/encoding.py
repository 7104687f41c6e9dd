"""Turn text into token ids that the model reads, without special tokens that the text already has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from zowrap.errors import ZOError
from zowrap.tasks.loading import Source
from zowrap.tasks.rows import Row


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text with the tokenizer's special tokens, each of them once."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[find_single(tokenizer, text, ids)]


def find_single(tokenizer: Any, text: str, ids: list[int]) -> slice:
    """Find the part of ``ids`` without the special tokens that the tokenizer added to a text which has them itself.

    Text that went through a chat template begins with ``<s>``, and a model has never seen two of them.

    Args:
        ids: the tokens of ``text`` with special tokens.
    """
    opening = tuple(token for token in (tokenizer.bos_token, tokenizer.cls_token) if token)
    closing = tuple(token for token in (tokenizer.eos_token, tokenizer.sep_token) if token)
    if not text.lstrip().startswith(opening) and not text.rstrip().endswith(closing):
        return slice(None)
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    added = len(ids) - len(bare)
    before = next((n for n in range(added + 1) if ids[n : n + len(bare)] == bare), None)
    if before is None:
        return slice(None)
    front, back = ids[:before], ids[before + len(bare) :]
    start = before if bare[: len(front)] == front else 0
    end = before + len(bare) if back and bare[-len(back) :] == back else len(ids)
    return slice(start, end)


def list_types(tokenizer: Any) -> list[int]:
    """The types other than 0 that a tokenizer gives to tokens of a single text: 2 for the ``<cls>`` of XLNet."""
    return [each for each in tokenizer("a", verbose=False).get("token_type_ids") or () if each]


def check_vocabulary(rows: Iterable[Row], encoded: Iterable[Sequence[int]], source: Source) -> None:
    """Check that the model has an embedding for every token of some rows, int ids ``[n]`` each.

    Raises:
        ZOError: the tokenizer has more tokens than the model, and a row holds one of these.
    """
    size = source.vocabulary_size
    if size is None:
        return
    for row, ids in zip(rows, encoded, strict=True):
        if ids and max(ids) >= size:
            raise unknown_token(row.where, max(ids), size, source)


def unknown_token(where: str, token: int, size: int, source: Source) -> ZOError:
    """The error for a token of which the model, whose embedding has ``size`` rows, has none."""
    return ZOError(
        f"{where} has the token {source.tokenizer.convert_ids_to_tokens(token)!r}, which the model does not know: the "
        f"tokenizer of {source.name} has {len(source.tokenizer)} tokens and the model an embedding of {size}; extend "
        "it with model.resize_token_embeddings(len(tokenizer)) and save the model again"
    )
