"""Weights that a checkpoint lacks, and weights of it that a model has no place for, are told by name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.support.tiny_run import tiny_llama
from zowrap.errors import ZOError
from zowrap.tasks.loading import Source, load_model, open_source

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("zowrap"), "propagate", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def rename(folder: Path, name: str, to: str | None) -> None:
    """Give a tensor of the file another name, or remove it."""
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    save_file({**tensors, **({to: tensor} if to else {})}, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, complete: bool) -> torch.nn.Module:
    source = Source(str(folder), PretrainedConfig.from_pretrained(folder), None, complete=complete)
    return load_model(source, AutoModelForCausalLM, torch.float32)


def test_a_model_to_be_trained_may_lack_weights_and_they_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rename(folder, UP, "model.layers.0.mlp.upproj.weight")
    with caplog.at_level(logging.WARNING, logger="zowrap"):
        load(folder, complete=False)
    told = [record.getMessage() for record in caplog.records if record.name == "zowrap"]
    assert any("freshly initialised" in each and UP in each for each in told)
    assert any("not taken" in each and "mlp.upproj.weight" in each for each in told)


def test_a_model_that_nothing_will_train_must_be_whole(folder: Path) -> None:
    load(folder, complete=True)
    rename(folder, UP, None)
    with pytest.raises(ZOError, match=rf"lacks weights that this model has.*{UP}"):
        load(folder, complete=True)


def test_a_run_with_weights_of_another_model_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(32, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="zowrap"):
        load(folder, complete=True)  # a model of somebody else: told
    assert "model.layers.2.mlp.up_proj.weight" in caplog.text
    (folder / "zowrap.json").write_text("{}")
    with pytest.raises(ZOError, match=r"has no place for: model\.layers\.2\.mlp\.up_proj\.weight"):
        load(folder, complete=True)


def test_a_hub_that_gave_no_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question without a connection waits about 20 s for its retries; the cache is still looked into."""
    asked = []
    monkeypatch.setattr(
        "zowrap.tasks.loading.find_file", lambda name, file, cached=False: asked.append((name, file, cached))
    )
    with pytest.raises(ZOError, match="no-such-model is not a directory here"):
        open_source("no-such-model")
    assert asked == [("no-such-model", "adapter_config.json", True)]
