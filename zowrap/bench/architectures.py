"""Build causal language models of published sizes by name, with random weights and without a download."""

from __future__ import annotations

from typing import Any

import torch

from zowrap.errors import ZOError, nearest


def _opt(hidden: int, layers: int, heads: int, vocabulary: int = 50272, positions: int = 2048) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "opt", "vocab_size": vocabulary, "max_position_embeddings": positions, **sizes}


def _llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 2048, **sizes}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt-tiny": _opt(32, 4, 4, vocabulary=160, positions=64),  # to try out the command
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
}


def build_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Module:
    """Build a model in evaluation mode, with the same weights every time.

    Raises:
        ZOError: the name is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in ARCHITECTURES:
        raise ZOError(f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}")
    settings = dict(ARCHITECTURES[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def make_batch(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Make a batch of random token ids as inputs and labels: int64 ``[rows, length]``.

    Raises:
        ZOError: ``length`` exceeds the model's window.
    """
    window = model.config.max_position_embeddings
    if length > window:
        raise ZOError(f"--seq {length} is longer than this architecture's window of {window}")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
