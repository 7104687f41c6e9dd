"""Make a tiny random model of any transformers family, and a batch for it.

A family is a pair (task, model type), such as ``("causal", "llama")``. transformers names the model class that does the
task; its configuration is built from its own defaults, with every size that :data:`SIZES` knows made small. What a
family needs beside that stands in :data:`CHANGES`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
CLASSES = 3
IMAGE = 32  # pixels along each side
LARGEST = 5_000_000  # parameters: a larger model has a size that SIZES does not know

_MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "classes": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "tokens": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "answers": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "images": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
TASKS = tuple(_MAPPINGS)

_WIDTH, _HEADS, _LAYERS, _INNER = 32, 4, 2, 48
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("embedding_size", "d_embed", "hidden_dim_embed", "rotary_dim_size", "dim_model"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_decoder_attention_heads",), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), _INNER),
    **dict.fromkeys(("n_inner", "inner_dim", "hidden_dim", "d_inner", "ffn_hidden_size", "dim_ff"), _INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_dim"), 16),
    **dict.fromkeys(("shared_intermediate_size", "ffn_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("vocab_size_per_layer_input", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "sep_token_id"), 2),
    **dict.fromkeys(("mask_token_id", "unk_token_id", "cls_token_id"), 3),
    "image_size": IMAGE,
    "patch_size": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 16,
    "attention_window": 16,
}
# What a family needs beside the sizes; "-" in front of a name leaves the family's own default.
_LATENT = {"num_key_value_heads": _HEADS, "-head_dim": None}  # latent attention has as many keys as queries
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_DECODER_START = {"decoder_start_token_id": 0}
_STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "mistral4"), _LATENT),
    "youtu": {**_LATENT, "pad_token_id": None},  # transformers clears that row of the embedding when it loads a model
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _LINEAR_AND_FULL),
    **dict.fromkeys(("convnext", "convnextv2", "poolformer"), _STAGES),
    **dict.fromkeys(("t5", "longt5"), _DECODER_START),
    "switch_transformers": {**_DECODER_START, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": _WIDTH},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "funnel": {"pad_token_id": None},  # as youtu
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "chunk_size": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "roc_bert": {
        "pronunciation_vocab_size": 64,
        "shape_vocab_size": 64,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 16},
    "lilt": {"channel_shrink_ratio": 2},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "bit": {"embedding_size": 8, **_STAGES, "hidden_sizes": [32, 32, 32, 32]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "patch_size": 4, "window_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "patch_size": 4, "window_size": 4},
    "donut-swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "patch_size": 4, "window_size": 4},
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "depths": [1, 1, 1],
        "num_attention_heads": [2, 2, 2],
        "key_dim": [4, 4, 4],
    },
    "pvt": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "hiera": {
        "image_size": [IMAGE, IMAGE],
        "embed_dim": 8,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
    },
    "siglip2": {"num_patches": 16},
    "mobilevitv2": {"-patch_size": None},
}


class NotMade(Exception):
    """A family that has no tiny model: the message says why."""


def families() -> list[str]:
    """The names ``task:type`` of all families that transformers has."""
    return [f"{task}:{config.model_type}" for task, mapping in _MAPPINGS.items() for config in mapping]


def tiny_config(kind: type, changes: dict[str, Any] | None = None) -> Any:
    """A configuration of class ``kind`` with small sizes, its nested configurations included."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    given = {name: value for name, value in SIZES.items() if name in known}
    given = {name: value for name, value in given.items() if not _is_sequence(known[name])}
    aliases = set(getattr(kind, "attribute_map", {}))
    given = {name: value for name, value in given.items() if name not in aliases}
    for name, nested in (getattr(kind, "sub_configs", None) or {}).items():
        if name in known and dataclasses.is_dataclass(nested) and nested.model_type:
            given[name] = tiny_config(nested).to_dict()
    for name, value in {**CHANGES.get(kind.model_type, {}), **(changes or {})}.items():
        given.pop(name.removeprefix("-"), None)
        if not name.startswith("-"):
            given[name] = value
    given.setdefault("num_labels", CLASSES)
    return kind(**given)


def _is_sequence(field: dataclasses.Field) -> bool:
    default = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return isinstance(default, (list, tuple))


def make(family: str) -> nn.Module:
    """The tiny model of a family, in evaluation mode: the same weights on every call.

    Raises:
        NotMade: it would have more than :data:`LARGEST` parameters.
    """
    task, kind = family.split(":")
    config = tiny_config(CONFIG_MAPPING[kind], {"num_labels": 2} if task == "answers" else None)
    model_class = _MAPPINGS[task][type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > LARGEST:
        raise NotMade(f"{count / 1e6:.0f}M parameters even with small sizes")
    torch.manual_seed(0)
    return model_class(config).eval()


def try_out(family: str) -> None:
    """Make the model of a family and ask for its own loss, outside of zowrap.

    Raises:
        NotMade: transformers raises an error, or the loss is not a finite number.
    """
    try:
        model = make(family)
        with torch.no_grad():
            loss = model(**batch(family, model)).loss
    except NotMade:
        raise
    except Exception as error:  # of any configuration, model or kernel that is not installed
        sentence = " ".join((str(error) or type(error).__name__).split())
        raise NotMade(sentence[:160]) from error
    if loss is None or not bool(torch.isfinite(loss).all()):
        raise NotMade("its loss is not a finite number")


def batch(family: str, model: nn.Module, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs and labels for a family; the second row of a text is padded where the model reads a mask."""
    task, _ = family.split(":")
    draw = torch.Generator().manual_seed(seed)
    if task == "images":
        config = model.config
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(rows, channels, IMAGE, IMAGE, generator=draw)
        return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (rows,), generator=draw)}
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    ids[:, -1] = 2  # heads of encoder-decoders read the end-of-text token
    ids[1, length // 2] = 2
    ids = torch.where(mask.bool(), ids, 0)
    inputs = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = mask
    if task in ("causal", "masked"):
        inputs["labels"] = ids.masked_fill(~mask.bool(), -100)
    elif task == "seq2seq":
        inputs["labels"] = torch.randint(4, VOCABULARY, (rows, 7), generator=draw)
    elif task == "classes":
        inputs["labels"] = torch.randint(0, CLASSES, (rows,), generator=draw)
    elif task == "tokens":
        inputs["labels"] = torch.randint(0, CLASSES, (rows, length), generator=draw).masked_fill(~mask.bool(), -100)
    else:
        inputs["start_positions"] = torch.randint(0, length // 2, (rows,), generator=draw)
        inputs["end_positions"] = torch.randint(0, length // 2, (rows,), generator=draw)
    return inputs
