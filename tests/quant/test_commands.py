"""The command line on quantised models: tune, eval, resume, replay, export."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open


def run_options(models, data, out) -> list[str]:
    return ["tune", models["sequence"], "--data", data["train"], "--out", out, "--steps", "3", "--batch-size", "4",
            "--lr", "1e-3", "--engine", "eager", "--json"]  # fmt: skip


@pytest.mark.parametrize("quantized", ["scales", "codes"])
def test_an_8_bit_run_is_evaluated_and_exported(quantized, models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    done = zowrap_cli(*run_options(models, data, out), "--load-in-8bit", "--quantized", quantized)
    assert done.code == 0, done.err
    saved = json.loads((out / "zowrap.json").read_text())["options"]
    assert (saved["quantized"], saved["eps"]) == (quantized, 1e-1 if quantized == "scales" else 1e-3)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    evaluated = zowrap_cli("eval", out, "--data", data["test"], "--json")
    assert evaluated.code == 0, evaluated.err
    exported = zowrap_cli("export", out, "--to", tmp_path / "bf16", "--format", "bf16", "--json")
    assert exported.code == 0, exported.err
    assert 0 < exported.json["logit_error"] < 0.1
    with safe_open(tmp_path / "bf16" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    again = zowrap_cli("eval", tmp_path / "bf16", "--data", data["test"], "--json")
    assert again.code == 0, again.err
    assert again.json["loss"] == pytest.approx(evaluated.json["loss"], rel=0.05)
    replayed = zowrap_cli("replay", models["sequence"], out, "--to", tmp_path / "again", "--json")
    assert replayed.code == 0, replayed.err


def test_a_run_of_adapters_is_evaluated_and_merged(models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    lora = ["--lora-r", "2", "--lora-alpha", "4", "--lora-target-modules", "query", "--lora-target-modules", "value"]
    done = zowrap_cli(*run_options(models, data, out), "--load-in-8bit", "--use-peft", *lora)
    assert done.code == 0, done.err
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], set(settings["target_modules"])) == (2, 4, {"query", "value"})
    assert settings["base_model_name_or_path"] == str(models["sequence"])
    assert not (out / "config.json").exists()  # transformers would look for a whole model beside it
    evaluated = zowrap_cli("eval", out, "--data", data["test"], "--json")
    assert evaluated.code == 0, evaluated.err
    for form in ("adapters", "merged"):
        exported = zowrap_cli("export", out, "--to", tmp_path / form, "--format", form, "--json")
        assert exported.code == 0, exported.err
    assert exported.json["merge_error"] > 0
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = zowrap_cli("eval", tmp_path / "merged", "--data", data["test"], "--json")
    assert merged.code == 0, merged.err


@pytest.mark.parametrize("quantized", ["scales", "codes", "adapters"])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    quantized, models, data, tmp_path, zowrap_cli, monkeypatch
) -> None:
    from zowrap.cli import progress

    class Stop(progress.Progress):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 2:
                raise RuntimeError("the machine went down")

    options = ("--load-in-8bit", "--quantized", quantized, "--steps", "4", "--save-every", "1")
    whole = zowrap_cli(*run_options(models, data, tmp_path / "whole"), *options)
    assert whole.code == 0, whole.err
    assert (whole.json["full_rows"] is None) == (quantized != "codes")
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Progress", Stop)
        assert zowrap_cli(*run_options(models, data, tmp_path / "run"), *options).code == 1
    on = zowrap_cli("tune", "--resume", "--out", tmp_path / "run", "--json")
    assert on.code == 0 and on.json["resumed_from"] > 0, on.err
    name = "adapter_model.safetensors" if quantized == "adapters" else "model.safetensors"
    with safe_open(tmp_path / "run" / name, "pt") as one, safe_open(tmp_path / "whole" / name, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(n), other.get_tensor(n)) for n in one.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--load-in-8bit", "--load-in-4bit"], "give one"),
        (["--load-in-8bit", "--quantized", "scale"], "did you mean"),
        (["--quantized", "scales"], "this model has none"),
        (["--load-in-4bit", "--quantized", "codes"], "4-bit ones take adapters"),
        (["--use-peft", "--quantized", "scales"], "give one of them"),
        (["--lora-target-modules", "query"], "add --use-peft"),
        (["--use-peft", "--lora-r", "0"], "--lora-r must be at least 1"),
        (["--along", "evaluated"], "--along evaluated is for 16-bit weights: add --dtype bfloat16"),
        (["--masters"], "--masters is for 16-bit weights: add --dtype bfloat16"),
    ],
)
def test_bad_options_are_one_sentence(options, problem, models, data, tmp_path, zowrap_cli) -> None:
    done = zowrap_cli(*run_options(models, data, tmp_path / "run"), *options)
    assert done.code == 2 and problem in done.json["error"]
    assert not (tmp_path / "run").exists()
