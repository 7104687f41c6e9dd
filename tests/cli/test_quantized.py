"""The command line on quantised models: tune, eval, resume, replay, export."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from tests.conftest import make_tokenizer
from tests.support.slow import slow_except
from zowrap import quant
from zowrap.quant import modes
from zowrap.storage.formats import DTYPES
from zowrap.tasks.adapted import load_adapted


def run_options(models, data, out) -> list[str]:
    return ["tune", models["sequence"], "--data", data["train"], "--out", out, "--steps", "3", "--batch-size", "4",
            "--lr", "1e-3", "--engine", "eager", "--json"]  # fmt: skip


@pytest.mark.parametrize("quantized", ["scales", "codes"])
def test_an_8_bit_run_is_evaluated_and_exported(quantized, models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    done = zowrap_cli(*run_options(models, data, out), "--load-in-8bit", "--quantized", quantized)
    assert done.code == 0, done.err
    saved = json.loads((out / "zowrap.json").read_text())["options"]
    assert (saved["quantized"], saved["eps"]) == (quantized, modes.EPS[quantized])
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


@pytest.mark.parametrize("quantized", slow_except(["codes"], ["scales", "codes", "adapters"]))
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


# --- a head that the checkpoint does not have ----------------------------------------------------------------------


def bert_config(**options: Any) -> transformers.BertConfig:
    """Plain transformers runs it, too: on some processors its 4-bit layers want 32 rows and blocks of 64 columns."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    words = len(make_tokenizer("bert"))
    return transformers.BertConfig(vocab_size=words, max_position_embeddings=128, **small, **options)


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> Path:
    """A BERT for masked words: a classification head, and its pooler, start random."""
    folder = tmp_path_factory.mktemp("models") / "masked"
    torch.manual_seed(0)
    transformers.BertForMaskedLM(bert_config()).save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def tuned(models, headless, data, out, zowrap_cli, *options: str) -> Any:
    done = zowrap_cli(*run_options({**models, "sequence": headless}, data, out), "--seed", "1", *options)
    assert done.code == 0, done.err
    return zowrap_cli("eval", out, "--data", data["test"], "--json").json


@pytest.mark.parametrize("scheme", ["--load-in-8bit", "--load-in-4bit"])
def test_a_fresh_head_moves_beside_adapters_and_is_saved(scheme, models, headless, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    measured = tuned(models, headless, data, out, zowrap_cli, scheme, "--use-peft", "--eval-data", str(data["test"]),
                     "--eval-every", "3")  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((out / "zowrap.json").read_text())["status"]["best_step"]
    (known,) = (line["eval_loss"] for line in lines if line["step"] == best and "eval_loss" in line)
    assert measured["loss"] == pytest.approx(known, rel=1e-5)
    saved = stored(out / "adapter_model.safetensors")
    assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.weight"} <= set(saved)
    # Plain transformers, told what the base is: the same logits.
    reload = [
        transformers.AutoModelForSequenceClassification.from_pretrained(out, **quant.load_options(out)).eval()
        for _ in range(2)
    ]
    ids = torch.arange(5, 13).reshape(2, 4)
    with torch.no_grad():
        one, other = (model(ids).logits for model in reload)
        mine = load_adapted(out)(ids).logits
    assert torch.equal(one, other) and torch.equal(one, mine)
    for form in ("bf16", "fp32"):
        exported = zowrap_cli("export", out, "--to", tmp_path / form, "--format", form, "--json")
        assert exported.code == 0, exported.err
        assert 0 <= exported.json["logit_error"] < 0.2
        again = zowrap_cli("eval", tmp_path / form, "--data", data["test"], "--json")
        assert again.json["loss"] == pytest.approx(measured["loss"], rel=0.05)
        config = json.loads((tmp_path / form / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"] and "quantization_config" not in config
        tensors = stored(tmp_path / form / "model.safetensors")
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {DTYPES[form]}
        assert not any("lora" in name or "modules_to_save" in name or "SCB" in name for name in tensors)
    merged = zowrap_cli("export", out, "--to", tmp_path / "merged", "--format", "merged", "--json")
    if scheme == "--load-in-4bit":
        assert merged.code == 2 and "--format bf16" in merged.json["error"]
        return
    assert merged.code == 0, merged.err
    again = zowrap_cli("eval", tmp_path / "merged", "--data", data["test"], "--json")
    assert again.json["loss"] == pytest.approx(measured["loss"], rel=0.05)


def test_a_fresh_head_moves_beside_scales(models, headless, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    tuned(models, headless, data, out, zowrap_cli, "--load-in-8bit")
    journal = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} <= set(journal["parameters"])
    weight = stored(out / "model.safetensors")["classifier.weight"]
    assert weight.is_floating_point()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(model.classifier.weight, weight)
    replayed = zowrap_cli("replay", headless, out, "--to", tmp_path / "again", "--json")
    assert replayed.code == 0, replayed.err
    assert torch.equal(stored(tmp_path / "again" / "model.safetensors")["classifier.weight"], weight)


def test_a_run_with_sentence_form_is_merged_as_what_it_was(models, headless, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    measured = tuned(models, headless, data, out, zowrap_cli, "--load-in-8bit", "--use-peft", "--head", "sentence",
                     "--lr", "1e-1")  # fmt: skip
    exported = zowrap_cli("export", out, "--to", tmp_path / "fp32", "--format", "fp32", "--json")
    assert exported.code == 0, exported.err
    again = zowrap_cli("eval", tmp_path / "fp32", "--data", data["test"], "--head", "sentence", "--json")
    assert again.json["loss"] == pytest.approx(measured["loss"], rel=0.05)


def test_norms_move_beside_adapters_and_are_saved(models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    asked = ["--trainable", "*lora_*", "--trainable", "*LayerNorm*"]
    done = zowrap_cli(*run_options(models, data, out), "--load-in-8bit", "--use-peft", *asked)
    assert done.code == 0, done.err
    saved = stored(out / "adapter_model.safetensors")
    base = stored(models["sequence"] / "model.safetensors")
    norms = [name for name in saved if name.endswith("LayerNorm.weight")]
    assert norms and all(not torch.equal(saved[n], base[n.removeprefix("base_model.model.")]) for n in norms)
    replayed = zowrap_cli("replay", models["sequence"], out, "--to", tmp_path / "again", "--json")
    assert replayed.code == 0, replayed.err
    again = stored(tmp_path / "again" / "adapter_model.safetensors")
    assert list(again) == list(saved) and all(torch.equal(again[name], saved[name]) for name in saved)


# --- the options of adapters, and the folder they name ---------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, expected", [(["query"], {"query"}), (["query,value"], {"query", "value"}), (["all-linear"], None)]
)
def test_rank_and_targets_hold_without_use_peft(targets, expected, models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    named = [word for target in targets for word in ("--lora-target-modules", target)]
    done = zowrap_cli(*run_options(models, data, out), "--load-in-4bit", "--lora-r", "3", "--lora-alpha", "5", *named)
    assert done.code == 0, done.err
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 5)
    names = {name.rsplit(".", 1)[-1] for name in settings["target_modules"]}
    assert names == (expected or {"query", "key", "value", "dense", "classifier"})
    # Layers of 16 rows: the library's own refuse them on processors with bfloat16 instructions.
    evaluated = zowrap_cli("eval", out, "--data", data["test"], "--json")
    assert evaluated.code == 0, evaluated.err
    replayed = zowrap_cli("replay", models["sequence"], out, "--to", tmp_path / "again", "--json")
    assert replayed.code == 0, replayed.err


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere(
    models, data, tmp_path, zowrap_cli, monkeypatch
) -> None:
    monkeypatch.chdir(models["sequence"].parent)
    out = tmp_path / "run"
    done = zowrap_cli(*run_options({"sequence": "sequence"}, data, out), "--load-in-8bit", "--use-peft")
    assert done.code == 0, done.err
    monkeypatch.chdir(tmp_path)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(models["sequence"])
    evaluated = zowrap_cli("eval", out, "--data", data["test"], "--json")
    assert evaluated.code == 0, evaluated.err


def test_a_dtype_is_refused_for_a_quantised_model(models, data, tmp_path, zowrap_cli) -> None:
    out = tmp_path / "run"
    assert zowrap_cli(*run_options(models, data, out), "--load-in-8bit").code == 0
    done = zowrap_cli("export", out, "--to", tmp_path / "to", "--dtype", "bfloat16", "--json")
    assert done.code == 2 and "--format bf16" in done.json["error"]
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("command", ["tune", "inspect"])
def test_a_scheme_that_is_not_supported_is_named_before_anything_loads(
    command, models, data, tmp_path, zowrap_cli
) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(models["sequence"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    given = run_options({"sequence": folder}, data, tmp_path / "run")
    done = zowrap_cli(*(given if command == "tune" else ["inspect", folder, "--json"]))
    assert done.code == 2 and "quantised by GPTQ" in done.json["error"] and "load_in_8bit" in done.json["error"]


@pytest.mark.parametrize("command", ["tune", "inspect"])
@pytest.mark.parametrize(
    "package, option, install",
    [("bitsandbytes", "--load-in-8bit", "bitsandbytes"), ("peft", "--use-peft", "'zowrap[peft]'")],
)
def test_a_missing_package_is_named_before_anything_is_read(
    command, package, option, install, models, data, tmp_path, zowrap_cli, monkeypatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    given = run_options({"sequence": tmp_path / "no model"}, data, tmp_path / "run")
    done = zowrap_cli(*(given if command == "tune" else ["inspect", tmp_path / "no model", "--json"]), option)
    assert done.code == 2 and f"{package}, which is not installed: pip install {install}" in done.json["error"]


def test_a_folder_of_adapters_is_not_tuned_anew(models, data, tmp_path, zowrap_cli) -> None:
    given = run_options(models, data, tmp_path / "one")
    assert zowrap_cli(*given, "--load-in-8bit", "--use-peft").code == 0
    done = zowrap_cli(*run_options({"sequence": tmp_path / "one"}, data, tmp_path / "other"))
    assert done.code == 2 and "holds adapters: go on with their run (--resume), start from what" in done.json["error"]
    assert not (tmp_path / "other").exists()


def test_a_run_that_cannot_start_leaves_no_folder(models, data, tmp_path, zowrap_cli) -> None:
    done = zowrap_cli(*run_options(models, data, tmp_path / "run"), "--trainable", "nothing.of.this")
    assert done.code == 2 and not (tmp_path / "run").exists()


# --- checkpoints that are quantised already --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme, way", [("int8", "scales"), ("int8", "codes"), ("int8", "adapters"), ("nf4 twice", "adapters")]
)
def test_a_quantised_checkpoint_is_tuned_and_saved(scheme, way, data, tmp_path, zowrap_cli) -> None:
    """What transformers did in reading it has no inverse, which its saving would ask for."""
    stored_model(scheme).save_pretrained(tmp_path / "model")
    make_tokenizer("bert").save_pretrained(tmp_path / "model")
    given = run_options({"sequence": tmp_path / "model"}, data, tmp_path / "run")
    done = zowrap_cli(*given, "--quantized", way, "--eval-data", data["test"], "--save-every", "2")
    assert done.code == 0, done.err
    evaluated = zowrap_cli("eval", tmp_path / "run", "--data", data["test"], "--json")
    assert evaluated.code == 0 and evaluated.json["loss"] == pytest.approx(done.json["loss"], rel=1e-5), evaluated.err
    if way != "adapters":
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
        assert again.is_quantized


@pytest.mark.parametrize("scheme, asked", [("int8", "4bit"), ("nf4 twice", "8bit")])
@pytest.mark.parametrize("command", ["tune", "inspect"])
def test_a_quantised_checkpoint_is_not_loaded_otherwise(scheme, asked, command, data, tmp_path, zowrap_cli) -> None:
    stored_model(scheme).save_pretrained(tmp_path / "model")
    make_tokenizer("bert").save_pretrained(tmp_path / "model")
    given = run_options({"sequence": tmp_path / "model"}, data, tmp_path / "run")
    given = given if command == "tune" else ["inspect", tmp_path / "model", "--json"]
    done = zowrap_cli(*given, f"--load-in-{asked}")
    assert done.code == 2 and f"cannot be loaded in {asked}: leave out --load-in-{asked}" in done.json["error"]


def stored_model(scheme: str) -> Any:
    """A classifier of two labels as loading it in a scheme gives it."""
    from tests.support.quantized_models import SCHEMES

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertForSequenceClassification(bert_config()).save_pretrained(folder)
        settings = transformers.BitsAndBytesConfig(**SCHEMES[scheme])
        return transformers.BertForSequenceClassification.from_pretrained(folder, quantization_config=settings)


# --- what the documentation says --------------------------------------------------------------------------------------


def test_the_documented_way_to_reload_adapters(models, data, tmp_path, zowrap_cli) -> None:
    """Three labels and a 16-bit base: neither is in a folder of adapters where from_pretrained looks for it."""
    rows = [{"text": text, "label": label} for text, label in zip(("a film", "the plot", "good"), "xyz", strict=True)]
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 4))
    transformers.BertForSequenceClassification(bert_config(num_labels=3)).save_pretrained(tmp_path / "model")
    make_tokenizer("bert").save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    given = run_options({"sequence": tmp_path / "model"}, {"train": tmp_path / "three.jsonl"}, out)
    done = zowrap_cli(*given, "--load-in-8bit", "--use-peft", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    page = Path(__file__).parents[2] / "docs" / "quantized.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace('"RUN"', repr(str(out))), names)
    ids = torch.arange(5, 13).reshape(2, 4)
    with torch.no_grad():
        logits = names["model"].eval()(ids).logits
        assert logits.shape == (2, 3) and logits.dtype == torch.bfloat16
        assert torch.equal(logits, load_adapted(out)(ids).logits)
