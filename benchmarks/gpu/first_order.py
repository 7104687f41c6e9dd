"""Build the first-order contenders: AdamW with gradient checkpointing, on all weights or on adapters."""

from __future__ import annotations

from typing import Any

import torch

from zowrap.bench.contenders import Contender


def with_adapters(model: Any) -> Any:
    """Attach LoRA of rank 8 to the attention's queries and values, as in the LoRA paper (2106.09685)."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def make(name: str, model: Any, batch: dict[str, torch.Tensor], int8: bool) -> Contender:
    """Build a contender on ``model``, which it changes.

    Args:
        int8: the model's weights are quantised: it is prepared as PEFT prescribes for that.
    """
    import peft

    if name == "AdamW, LoRA r8":
        if int8:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = with_adapters(model)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=weights[0].is_cuda)

    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(name, step)
