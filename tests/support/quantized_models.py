"""Tiny quantised models of three families, as ``from_pretrained`` gives them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch import nn
from transformers import BitsAndBytesConfig

from tests.support.families import VOCABULARY

# 64 columns: the block of a 4-bit weight; 32 rows: what a processor with bfloat16 instructions takes at once.
_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_MODELS = {
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        )
    ),
    "llama": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, num_key_value_heads=2, **_LLAMA)
    ),
    "bert": lambda: T.BertForSequenceClassification(
        T.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=80, num_labels=32, **_LLAMA)
    ),
}
FAMILIES = tuple(_MODELS)

SCHEMES = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8 with outliers": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
_folders: dict[str, Path] = {}


def folder(family: str) -> Path:
    """A checkpoint of the family in float32, written once for each process."""
    if family not in _folders:
        torch.manual_seed(0)
        model = _MODELS[family]()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.ndim == 2:
                    tensor.mul_(3.0)  # so that logits differ by more than rounding
                if "norm" in name.lower() and tensor.ndim == 1:
                    tensor[0] = 9.0  # some columns of activations reach the outlier threshold
        _folders[family] = Path(tempfile.mkdtemp()) / family
        model.save_pretrained(_folders[family])
    return _folders[family]


def quantized(family: str, scheme: str = "int8", **options: Any) -> nn.Module:
    """The family's model, loaded in a scheme."""
    kind: Any = type(_MODELS[family]())
    settings = BitsAndBytesConfig(**SCHEMES[scheme])
    return kind.from_pretrained(folder(family), quantization_config=settings, **options)


def plain(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The family's model without quantisation."""
    kind: Any = type(_MODELS[family]())
    return kind.from_pretrained(folder(family), dtype=dtype)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a batch, its labels left out."""
    return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
