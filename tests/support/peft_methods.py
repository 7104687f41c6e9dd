"""One configuration for each kind of adapter that peft has, for a tiny Llama of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.families import LLAMA, VOCABULARY

_LINEAR = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}

# name → (configuration class, arguments)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, **_LINEAR}),
    "rslora": ("LoraConfig", {"r": 2, "use_rslora": True, **_LINEAR}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True, **_LINEAR}),
    "pissa": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa", **_LINEAR}),
    "lora with biases": ("LoraConfig", {"r": 2, "lora_bias": True, **_LINEAR}),
    "lora on the embedding": ("LoraConfig", {"r": 2, **_LINEAR, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora and a saved module": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"], **_LINEAR}),
    "lora and tokens": ("LoraConfig", {"r": 2, "trainable_token_indices": [20, 30], **_LINEAR}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [20, 30], "task_type": "CAUSAL_LM"}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, **_LINEAR}),
    "loha": ("LoHaConfig", {"r": 2, **_LINEAR}),
    "lokr": ("LoKrConfig", {"r": 2, **_LINEAR}),
    "ia3": ("IA3Config", {**_LINEAR, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8, **_LINEAR}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **_LINEAR}),
    "vera": ("VeraConfig", {"r": 4, **_LINEAR}),
    "randlora": ("RandLoraConfig", {"r": 4, **_LINEAR}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 16, "topk": 2, **_LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, **_LINEAR}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20, **_LINEAR}),
    "hra": ("HRAConfig", {"r": 2, **_LINEAR}),
    "miss": ("MissConfig", {"r": 2, **_LINEAR}),
    "road": ("RoadConfig", {"group_size": 4, **_LINEAR}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 0, **_LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 8, **_LINEAR}),
    "ln": ("LNTuningConfig", {"task_type": "CAUSAL_LM", "target_modules": ["input_layernorm"]}),
    "delora": ("DeloraConfig", {"r": 2, **_LINEAR}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2, **_LINEAR}),
    "hira": ("HiraConfig", {"r": 2, **_LINEAR}),
    "beft": ("BeftConfig", {**_LINEAR, "target_modules": ["v_proj"]}),
    "deft": ("DeftConfig", {"r": 2, **_LINEAR}),
    "glora": ("GloraConfig", {"r": 2, **_LINEAR}),
    "lily": ("LilyConfig", {"r": 2, **_LINEAR}),
    "peanut": ("PeanutConfig", {"r": 2, **_LINEAR}),
    "psoft": ("PsoftConfig", {"r": 4, **_LINEAR}),
    "pvera": ("PveraConfig", {"r": 4, **_LINEAR}),
    "frod": ("FrodConfig", {**_LINEAR}),
    "tinylora": ("TinyLoraConfig", {"r": 2, **_LINEAR}),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 32, **_LINEAR}),
    "supertuning": ("SupertuningConfig", {**_LINEAR}),
    "adamss": ("AdamssConfig", {"r": 8, "num_subspaces": 2, "subspace_rank": 2, **_LINEAR}),
    "osf": ("OSFConfig", {**_LINEAR}),
    "llama adapters": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2, "task_type": "CAUSAL_LM"}),
    "prompt tuning": ("PromptTuningConfig", _PROMPT),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16, **_PROMPT}),
    "p-tuning with an LSTM": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1, **_PROMPT},
    ),
    "prefix": ("PrefixTuningConfig", _PROMPT),
    "prefix, projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16, **_PROMPT}),
    "context-aware prompt": (
        "CPTConfig",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1, 2, 3, 4],
        },
    ),
}


def base_folder(folder: Path, tied: bool = False) -> Path:
    """Save the tiny Llama that the adapters are for."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(name: str, base: Path) -> Any:
    """The base with new adapters of a kind."""
    import peft

    kind, arguments = METHODS[name]
    torch.manual_seed(0)
    return peft.get_peft_model(load_base(base), getattr(peft, kind)(**arguments)).eval()


def words(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """A batch with padding and masked labels."""
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[0, 5], ids[-1, 0] = 20, 30
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[0, :4] = -100
    mask[1, -3:] = 0
    labels[1, -3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def loss_of(model: nn.Module, **batch: Tensor) -> float:
    return float(model(**{name: tensor.clone() for name, tensor in batch.items()}).loss)


@torch.no_grad()
def logits_of(model: nn.Module, **batch: Tensor) -> Tensor:
    return model(**{name: tensor.clone() for name, tensor in batch.items() if name != "labels"}).logits
