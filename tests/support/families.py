"""Tiny random models of many transformers families, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

VOCABULARY = 160
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "num_labels": 3,
}


def _causal(config: Any) -> nn.Module:
    return T.AutoModelForCausalLM.from_config(config)


def _classifier(config: Any) -> nn.Module:
    return T.AutoModelForSequenceClassification.from_config(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: _causal(
        T.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    ),
    "llama": lambda: _causal(T.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: _causal(T.Qwen2Config(**LLAMA)),
    "qwen3": lambda: _causal(T.Qwen3Config(**LLAMA, head_dim=8)),
    "mistral": lambda: _causal(T.MistralConfig(**LLAMA)),
    "gemma": lambda: _causal(T.GemmaConfig(**LLAMA, head_dim=8)),
    "phi": lambda: _causal(T.PhiConfig(**LLAMA)),
    "mixtral": lambda: _causal(T.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: _causal(T.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "bert": lambda: _classifier(T.BertConfig(**_BERT)),
    "roberta": lambda: _classifier(T.RobertaConfig(**_BERT, pad_token_id=1)),
    "distilbert": lambda: _classifier(
        T.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            num_labels=3,
        )
    ),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
}
CLASSIFIERS = ("bert", "roberta", "distilbert")


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with random weights, the same on every call; training mode, as ``from_config`` leaves it."""
    torch.manual_seed(0)
    return FAMILIES[name]().to(dtype)


def batch(name: str, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, the second row half padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if rows > 1:
        mask[1, length // 2 + 1 :] = 0
        labels[1, length // 2 + 1 :] = -100
    if name in CLASSIFIERS:
        labels = torch.randint(0, 3, (rows,), generator=draw)
    if name == "t5":
        labels = torch.randint(4, VOCABULARY, (rows, 5), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every parameter and buffer is bitwise what it was."""
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class DataDependent(nn.Module):
    """A forward that depends on values, which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * 2 if y.sum().item() > 0 else y
