"""What is saved loads with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.slow import slow_except
from tests.support.tiny_run import tiny_llama, trainer_in
from zowrap.storage.save import save_model


def by_head(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def by_module(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def by_parameter(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight


@pytest.mark.parametrize("share", slow_except([by_parameter], [by_head, by_module, by_parameter]))
def test_weights_that_a_script_shared_load_with_the_same_logits(tmp_path: Path, share: Any) -> None:
    model = tiny_llama(tie_word_embeddings=False).eval()
    share(model)
    ids = torch.arange(1, 9).reshape(1, 8)
    trainer_in(tmp_path, model, max_steps=4, save_steps=2, eval_dataset=None).train()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        torch.manual_seed(1)
        again = type(model).from_pretrained(folder).eval()
        with torch.no_grad():
            assert again(ids).logits.equal(model(ids).logits)
    fresh = tiny_llama(tie_word_embeddings=False).eval()
    share(fresh)  # the script makes the model anew, and the run goes on
    longer = trainer_in(tmp_path, fresh, max_steps=6, save_steps=2, eval_dataset=None)
    assert longer.train(resume_from_checkpoint=True).global_step == 6


def test_weights_that_the_configuration_ties_are_written_once(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain[1].weight = plain[0].weight
    save_model(plain, tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_file()
