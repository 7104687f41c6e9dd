"""State-space models and linear attention are one program for every length, and it is captured in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import zowrap
from tests.support.uncompiled import compile_nothing
from zowrap.compiler import scans

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: T.Qwen3NextForCausalLM(
        T.Qwen3NextConfig(
            **SIZES, **LINEAR, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    "olmo_hybrid": lambda: T.OlmoHybridForCausalLM(T.OlmoHybridConfig(**SIZES, **LINEAR)),
    "mamba": lambda: T.MambaForCausalLM(
        T.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "mamba2": lambda: T.Mamba2ForCausalLM(
        T.Mamba2Config(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8, n_groups=2,
            chunk_size=8,
        )
    ),
    "jamba": lambda: T.JambaForCausalLM(
        T.JambaConfig(
            **SIZES, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        )
    ),
}  # fmt: skip


def batch(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_program_for_every_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, at and beyond the size of a chunk; uncompiled, node by node."""
    compile_nothing(monkeypatch)
    torch.manual_seed(0)
    zm = zowrap.zo_wrap(MODELS[name](), "zo_sgd", eps=1e-2, engine="compiled")
    torch.manual_seed(0)
    eager = zowrap.zo_wrap(MODELS[name](), "zo_sgd", eps=1e-2, engine="eager")
    for rows, length in [(3, 11), (2, 16), (4, 70)]:
        for each in (zm, eager):
            each.discard()
            each.accumulate(**batch(rows, length))
        assert torch.allclose(zm.peek()[0], eager.peek()[0], rtol=1e-5), length
    (programs,) = zm.engine.captures.by_kind.values()
    assert len(programs) == 1 and len(programs[0].graph.nodes) < 1000
    assert programs[0].graph.find_nodes(op="call_function", target=torch.ops.zowrap.scan.default)


def test_layers_of_one_kind_call_one_scan() -> None:
    """Else their regions would be compiled one by one."""
    torch.manual_seed(0)
    model = T.MambaForCausalLM(T.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=3, state_size=4)).eval()
    zm = zowrap.zo_wrap(model, "zo_sgd", engine="compiled")
    program = zm.engine.captured(zm.prepare(batch(2, 5)))
    found = program.graph.find_nodes(op="call_function", target=torch.ops.zowrap.scan.default)
    assert len(found) == 3 and len({node.args[0] for node in found}) == 1


def test_the_functions_are_put_back() -> None:
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    torch.manual_seed(0)
    model = MODELS["mamba"]()
    with scans.capture_scans(model):
        assert modeling_mamba.mamba_selective_scan is not before
    assert modeling_mamba.mamba_selective_scan is before
