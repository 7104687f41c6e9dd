"""``zowrap inspect``: from a configuration alone, what fits, what it costs, and a picture of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as T

from tests.conftest import Outcome
from zowrap import machine
from zowrap.calibration import noise_floor
from zowrap.quant.modes import EPS

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def bare(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models' directories without their weights."""
    root = tmp_path_factory.mktemp("bare")
    for kind, path in models.items():
        shutil.copytree(path, root / kind, ignore=shutil.ignore_patterns("*.safetensors"))
    return {kind: root / kind for kind in models}


@pytest.mark.slow
def test_it_needs_no_weights_and_reads_none(
    zowrap_cli: Cli, models: dict[str, Path], bare: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(T.PreTrainedModel, "from_pretrained", refuse)
    whole, without = (zowrap_cli("inspect", paths["causal"], "--json") for paths in (models, bare))
    assert whole.code == without.code == 0, without.err
    one, other = whole.json, without.json
    assert one["model"] == str(models["causal"]) and one["moves"] == other["moves"] and one["costs"] == other["costs"]
    assert one["fits"] is True and one["needed_bytes"] == one["costs"]["memory"]["peak"] < one["free_bytes"]
    assert one["costs"]["batch"]["input_ids"] == [16, 64]  # all that the model reads


def test_a_model_far_too_large_is_inspected(zowrap_cli: Cli, tmp_path: Path) -> None:
    config = T.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=2, num_attention_heads=128, vocab_size=128256
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.num_hidden_layers = 8
    config.save_pretrained(tmp_path)
    told = zowrap_cli("inspect", tmp_path, "--batch-size", "2", "--max-length", "16", "--dtype", "float32")
    assert told.code == 0, told.err
    assert "does not fit: needs" in told.out and "what would help: --dtype bfloat16" in told.out


@pytest.mark.slow
def test_sizes_are_options(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    small, large = (told(zowrap_cli, bare["causal"], "--batch-size", rows) for rows in ("2", "4"))
    assert large["costs"]["step"]["flops"] == 2 * small["costs"]["step"]["flops"]
    half = told(zowrap_cli, bare["causal"], "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16" and all(m["rounding"] == "stochastic rounding" for m in half["moves"])


def test_the_schedule_is_an_option(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    small = (zowrap_cli, bare["causal"], "--batch-size", "4")
    both, alone = told(*small), told(*small, "--memory", "sequential")
    assert both["schedule"] == "paired" and both["schedule_why"]
    assert alone["schedule"] == "sequential" and alone["needed_bytes"] < both["needed_bytes"]


@pytest.mark.slow
def test_auto_takes_the_schedule_that_fits(
    zowrap_cli: Cli, bare: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = zowrap_cli("inspect", bare["causal"], "--json").json["costs"]["memory"]
    monkeypatch.setattr(machine, "free_memory", lambda: int(memories["sequential"] * 1.2))
    told = zowrap_cli("inspect", bare["causal"])
    assert told.code == 0 and "fits: needs" in told.out and "sequential: paired needs" in told.out
    monkeypatch.setattr(machine, "free_memory", lambda: memories["sequential"] // 2)
    told = zowrap_cli("inspect", bare["causal"], "--memory", "paired")
    assert told.code == 0 and "does not fit" in told.out and "--memory sequential" in told.out
    assert "a smaller --batch-size" in told.out


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("causal", ("--task", "lm"), marks=pytest.mark.slow),
        ("causal", ("--task", "classification", "--labels", "good,bad")),
        ("encoder", ("--task", "classification", "--labels", "good,bad")),
        ("sequence", ("--task", "classification")),
        pytest.param("sequence", ("--estimator", "population"), marks=pytest.mark.slow),
        pytest.param("causal", ("--blocks", "layer", "--rule", "zo_adam"), marks=pytest.mark.slow),
    ],
)
def test_tasks_are_built_as_tune_builds_them(
    zowrap_cli: Cli, bare: dict[str, Path], kind: str, options: tuple[str, ...]
) -> None:
    told = zowrap_cli("inspect", bare[kind], *options, "--json")
    assert told.code == 0, told.err
    assert told.json["costs"]["flops_ratio"] > 0.5 and told.json["costs_unknown"] is None


def test_programs_are_printed_after_each_pass(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    told = zowrap_cli("inspect", bare["causal"], "--programs", "--json")
    assert told.code == 0, told.err
    (history,) = told.json["programs"].values()
    assert history[0][0] == "capture" and history[-1][0] == "epilogue"
    assert all("def " in text for _, text in history)


def test_a_picture_tells_points_apart(zowrap_cli: Cli, bare: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "step.html"
    told = zowrap_cli("inspect", bare["causal"], "--html", file)
    assert told.code == 0 and "step.html written" in told.err
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "<script" not in text and "http" not in text
    for kind in ("shared", "s0", "s1", "all", "weight", "update"):
        assert f"class='{kind}" in text or f"class={kind}" in text, kind
    assert "more like it" not in text  # two layers are one region
    assert text.count("<section>") == text.count("</section>") == 2 and "epilogue" in text


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--direction", "lowrank(1)"), marks=pytest.mark.slow),
        pytest.param(("--estimator", "population"), marks=pytest.mark.slow),
        pytest.param(("--load-in-8bit",), marks=pytest.mark.slow),
        pytest.param(("--load-in-8bit", "--quantized", "codes"), marks=pytest.mark.slow),
    ],
)
def test_every_picture_of_two_points_has_both(
    zowrap_cli: Cli, bare: dict[str, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    file = tmp_path / "step.html"
    told = zowrap_cli("inspect", bare["sequence"], *options, "--html", file)
    assert told.code == 0, told.err
    text = file.read_text(encoding="utf-8")
    nodes = {kind: len(re.findall(f"<span class='{kind}( stored)?' title", text)) for kind in ("s0", "s1", "all")}
    assert nodes["s0"] == nodes["s1"] > nodes["all"], nodes
    assert "<span class='weight' title" in text


@pytest.mark.slow
def test_a_picture_of_many_layers_is_short(zowrap_cli: Cli, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16, "vocab_size": 40}
    lengths = []
    for layers in (4, 8):
        config = T.OPTConfig(num_hidden_layers=layers, max_position_embeddings=64, **sizes)
        config.architectures = ["OPTForCausalLM"]
        config.save_pretrained(tmp_path)
        assert zowrap_cli("inspect", tmp_path, "--html", tmp_path / "step.html").code == 0
        text = (tmp_path / "step.html").read_text(encoding="utf-8")
        assert f"and {layers - 1} more like it" in text
        lengths.append(len(text))
    assert lengths[1] < 1.3 * lengths[0]


def test_bad_input_is_one_sentence(zowrap_cli: Cli, bare: dict[str, Path], tmp_path: Path) -> None:
    for options, sentence in (
        ((tmp_path / "nowhere",), "no such model directory"),
        ((tmp_path,), "it has no config.json"),
        ((bare["causal"], "--batch-size", "0"), "--batch-size must be at least 1"),
        ((bare["causal"], "--max-length", "1"), "--max-length must be at least 2"),
        ((bare["causal"], "--html", tmp_path / "missing" / "step.html"), "cannot be written"),
        ((bare["causal"], "--html", tmp_path), "cannot be written"),
        ((bare["causal"], "--memory", "much"), "unknown --memory"),
        ((bare["causal"], "--task", "chess"), "unknown --task"),
        ((bare["causal"], "--task", "classification"), "--labels"),
        ((bare["causal"], "--rule", "nothing"), "nothing"),
        ((bare["encoder"], "--programs"), "no loss of its own"),
        ((bare["encoder"], "--html", tmp_path / "step.html"), "no loss of its own"),
        ((bare["causal"], "--programs", "--engine", "eager"), "eager"),
    ):
        told = zowrap_cli("inspect", *options)
        said = [line for line in told.err.splitlines() if not line.startswith("zowrap ")]  # its first line
        assert told.code == 2 and len(said) == 1 and sentence in said[0], (options, told)
    assert not (tmp_path / "step.html").exists()


def test_without_a_loss_what_moves_is_still_told(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    told = zowrap_cli("inspect", bare["encoder"], "--json")
    assert told.code == 0, told.err
    assert told.json["costs"] is None and "no loss of its own" in told.json["costs_unknown"]
    assert told.json["moves"] and told.json["needed_bytes"] > 0


def test_what_cannot_be_captured_is_said(zowrap_cli: Cli, tmp_path: Path) -> None:
    config = T.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    config.architectures = ["MambaForCausalLM"]
    config.save_pretrained(tmp_path)
    told = zowrap_cli("inspect", tmp_path, "--max-length", "8", "--json")
    assert told.code == 0, told.err
    record = json.loads(told.out)
    assert record["moves"] and record["needed_bytes"] > 0
    if record["costs"] is None:
        assert record["costs_unknown"]
        assert zowrap_cli("inspect", tmp_path, "--max-length", "8", "--programs").code == 2


# --- quantised models, and what else changes a step -----------------------------------------------------------------


def told(zowrap_cli: Cli, *arguments: object) -> dict:
    found = zowrap_cli("inspect", *arguments, "--json")
    assert found.code == 0, found.err
    return found.json


@pytest.mark.parametrize(
    ("options", "way", "moving"),
    [
        (("--load-in-8bit",), "scales move (the default for 8-bit", "log_scale"),
        (("--load-in-8bit", "--quantized", "codes"), "codes move (as asked); experimental", ".weight"),
        (("--load-in-8bit", "--use-peft"), "adapters move (the model has adapters)", "lora_"),
        (("--load-in-4bit",), "adapters move (", "lora_"),
    ],
)
def test_how_quantised_weights_would_move_is_told(
    zowrap_cli: Cli, bare: dict[str, Path], options: tuple[str, ...], way: str, moving: str
) -> None:
    found = told(zowrap_cli, bare["sequence"], "--engine", "eager", *options)  # without costs, which take seconds
    assert found["quantized"].startswith(way) and found["eps_why"] == f"the default of {way.split()[0]}"
    assert found["hyper"]["eps"] == pytest.approx(EPS[way.split()[0]])
    assert {moving in move["name"] for move in found["moves"]} == {True}


def test_what_quantised_weights_take_is_counted(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    plain, found = (told(zowrap_cli, bare["sequence"], *more) for more in ((), ("--load-in-8bit",)))
    assert found["costs"]["memory"]["weights"] < 0.8 * plain["costs"]["memory"]["weights"]
    assert found["costs"]["flops_ratio"] > 0.9 and found["needed_bytes"] == found["costs"]["memory"]["peak"]
    assert "log_scale" not in str(plain["moves"]) and plain["eps_why"] == "the default"


def test_an_8_bit_checkpoint_is_known_by_its_configuration(zowrap_cli: Cli, tmp_path: Path) -> None:
    from tests.support.quantized_models import quantized

    quantized("opt").save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    text = zowrap_cli("inspect", tmp_path).out
    assert "quantised  scales move (the default for 8-bit" in text and "q_proj.log_scale  [64]  float32" in text
    assert "eps        0.1 (the default of scales)" in text and "--data FILE measures" in text


def test_options_of_tune_change_what_is_told(zowrap_cli: Cli, bare: dict[str, Path]) -> None:
    model, half = (bare["causal"], "--engine", "eager"), ("--dtype", "bfloat16")  # without costs, which take seconds
    plain = told(zowrap_cli, *model, *half, "--rule", "zo_sgd")
    masters = told(zowrap_cli, *model, *half, "--rule", "zo_sgd", "--masters", "--along", "evaluated")
    assert masters["state_bytes"] == plain["state_bytes"] + 4 * plain["elements"]
    assert masters["moves"][0]["rounding"] == "to the nearest, from a float32 master, along the direction evaluated"
    momentum = told(zowrap_cli, *model, "--rule", "zo_sgd", "--rule-option", "momentum=0.9")
    assert momentum["state_bytes"] >= 4 * momentum["elements"] and "momentum=0.9" in momentum["rule"]
    small, large = (told(zowrap_cli, *model, "--use-peft", "--lora-r", r)["elements"] for r in ("2", "4"))
    assert large == 2 * small < plain["elements"]
    some = told(zowrap_cli, *model, "--use-peft", "--lora-r", "2", "--lora-target-modules", "q_proj")["elements"]
    assert some < small
    asked = told(
        zowrap_cli, *model, "--eps", "0.05", "--weight-decay", "0.1", "--blocks", "layer", "--block-order", "random"
    )
    assert asked["hyper"] == pytest.approx({**asked["hyper"], "eps": 0.05, "weight_decay": 0.1})
    assert asked["eps_why"] == "as asked"


def test_the_floor_under_eps_is_measured_with_data(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (models["sequence"], "--engine", "eager", "--load-in-8bit", "--data", data["train"])
    found = told(zowrap_cli, *options)["noise_floor"]
    assert found["eps"] == pytest.approx(0.1) and found["rounding"] > 0 and 0 <= found["agreement"] <= 1
    assert found["floor"] is None or found["floor"] < 0.1
    plain = zowrap_cli("inspect", models["sequence"], "--engine", "eager", "--data", data["train"])
    assert plain.code == 0 and "floor      none" in plain.out
    nan = float("nan")
    monkeypatch.setattr(
        noise_floor, "noise_floor", lambda zm, batch: noise_floor.NoiseFloor(1e-4, nan, 0.03, nan, 0.5, 3e-5)
    )
    shown = zowrap_cli("inspect", *options, "--eps", "1e-4")
    assert shown.code == 0 and "floor      eps is below it" in shown.out
    assert "--eps 0.0001 is below the floor" in shown.err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--load-in-8bit", "--load-in-4bit"), "give one"),
        (("--load-in-4bit", "--quantized", "codes"), "4-bit ones take adapters"),
        (("--quantized", "scales"), "this model has none"),
        (("--use-peft", "--lora-r", "0"), "--lora-r must be at least 1"),
        (("--masters",), "--masters is for 16-bit weights"),
        (("--along", "evaluated"), "--along evaluated is for 16-bit weights"),
        (("--rule-option", "momentum"), "--rule-option takes name=value"),
        (("--eps", "0"), "--eps must be a positive finite number"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_options_of_tune_are_refused(
    zowrap_cli: Cli, models: dict[str, Path], options: tuple[str, ...], sentence: str
) -> None:
    found = zowrap_cli("inspect", models["causal"], *options)
    assert found.code == 2 and sentence in found.err, found


def test_adapters_are_inspected_by_their_base(zowrap_cli: Cli, tmp_path: Path, bare: dict[str, Path]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(bare["causal"])}))
    found = zowrap_cli("inspect", tmp_path)
    assert found.code == 2 and f"zowrap inspect {bare['causal']} --use-peft" in found.err
