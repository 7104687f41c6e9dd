"""Tiny sentence encoders, saved as sentence-transformers saves them, and what it makes of texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_model

TEXTS = ["good movie", "the plot was very bad", "a", "it is the very great film it was a awful the plot"]


def make_encoder(folder: Path, make: Callable[[Any], list[Any]], kind: str = "encoder", **settings: Any) -> Path:
    """Save a random transformer with the modules that ``make(models)`` returns; ``settings`` are the Transformer's."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

    base = make_model(kind, folder.with_name(f"{folder.name}_base"), initializer_range=0.4)
    torch.manual_seed(1)
    first = models.Transformer(str(base), **settings)
    SentenceTransformer(modules=[first, *make(models)], device="cpu").save(str(folder), create_model_card=False)
    return folder


def change(file: Path, **values: Any) -> None:
    """Change entries of a JSON object; None removes one."""
    held = {**(json.loads(file.read_text()) if file.is_file() else {}), **values}
    file.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))


def encode(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Tensor:
    """The unit vectors of texts by sentence-transformers: float32 ``[texts, width]``."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", **options)
    return model.encode(texts, normalize_embeddings=True, convert_to_tensor=True).float()
