"""Models of pictures and text are one program, whatever the number of pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import zowrap
from tests.support.uncompiled import compile_nothing

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = 4


def llava() -> Any:
    torch.manual_seed(0)
    text = T.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=60, max_position_embeddings=96)
    vision = T.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_id=59, vision_feature_layer=-1)
    return T.LlavaForConditionalGeneration(config).eval()


def batch(pictures: list[int], length: int) -> dict[str, Tensor]:
    """A row for each entry, with so many pictures."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 55, (len(pictures), length), generator=draw)
    labels = ids.clone()
    for row, count in enumerate(pictures):
        ids[row, 1 : 1 + PATCHES * count], labels[row, 1 : 1 + PATCHES * count] = 59, -100
    pixels = torch.randn(sum(pictures), 3, 16, 16, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def test_the_number_of_pictures_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each row or not; uncompiled, node by node."""
    compile_nothing(monkeypatch)
    eager, zm = (
        zowrap.zo_wrap(llava(), "zo_sgd", lr=1e-2, eps=1e-2, engine=engine) for engine in ("eager", "compiled")
    )
    for inputs in (batch([1, 1, 1], 12), batch([1, 1], 15), batch([1, 2, 0, 2], 14)):
        assert torch.allclose(zm.step(**inputs).losses, eager.step(**inputs).losses, rtol=1e-5)
    assert [len(programs) for programs in zm.engine.captures.by_kind.values()] == [1]
    assert not zm.model.model.multi_modal_projector._forward_hooks
