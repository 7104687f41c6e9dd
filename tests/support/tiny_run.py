"""A training small enough to repeat: a tiny Llama on forty rows of unequal length."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zowrap.training.config import ZOConfig
from zowrap.training.trainer import ZOTrainer


def tiny_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))


def rows(count: int = 40, seed: int = 1) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 14, (1,), generator=generator))
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": ids})
    return found


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    return {"input_ids": pad("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": pad("labels", -100)}


def trainer_in(folder: str | os.PathLike[str], model: torch.nn.Module | None = None, **options) -> ZOTrainer:
    """A trainer of 24 steps of 4 rows, evaluated on 8; ``options`` go to ``ZOConfig`` or, by name, to the trainer."""
    for_trainer = {"eval_dataset": rows()[:8]}
    for name in ("eval_dataset", "callbacks", "compute_metrics", "batch_metrics", "loss_fn", "processing_class"):
        if name in options:
            for_trainer[name] = options.pop(name)
    defaults = {"max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 7}
    quiet = {"engine": "eager", "report_to": "none", "disable_tqdm": True, "log_level": "error"}
    args = ZOConfig(output_dir=str(folder), **{**defaults, **quiet, **options})
    model = tiny_llama() if model is None else model
    return ZOTrainer(model, args, collate, rows(), **for_trainer)


def weights_of(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update({f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()})
    assert found, f"no weights in {folder}"
    return found


def same_weights(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Bitwise, and under the same names."""
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
