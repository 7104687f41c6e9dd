"""Find the tokenizer in a model's folder or on the hub, and load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.storage.safetensors import StrPath, adapters_base

_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")


def find_tokenizer(place: StrPath) -> str:
    """Where a model's tokenizer is: with the model, or with the base of adapters, which peft saves without one."""
    base = adapters_base(place)
    own = base is None or any(any(Path(place).glob(each)) for each in _FILES)
    return str(place) if own else str(base)


def load_tokenizer(place: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a folder or on the hub.

    Raises:
        ZOError: it knows nothing but special tokens: transformers makes such a one for a model without a tokenizer.
        OSError, ValueError, …: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ZOError(f"{place} has no tokenizer files")
    return tokenizer
