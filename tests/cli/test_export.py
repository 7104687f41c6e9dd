"""``zowrap export`` and ``zowrap replay``: the model out of a run, by copy and from the journal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Outcome

Cli = Callable[..., Outcome]


@pytest.fixture
def run(zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path) -> Path:
    told = zowrap_cli(
        "tune", models["encoder"], "--data", data["train"], "--engine", "eager", "--steps", 3, "--out", tmp_path / "run"
    )
    assert told.code == 0, told.err
    return tmp_path / "run"


def test_export_copies_the_model_and_nothing_of_the_run(zowrap_cli: Cli, run: Path, tmp_path: Path) -> None:
    told = zowrap_cli("export", run, "--to", tmp_path / "out", "--json")
    assert told.code == 0 and "model.safetensors" in told.json["files"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"zowrap.json", "journal.jsonl", "metrics.jsonl"}

    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_replay_makes_the_last_weights_again(
    zowrap_cli: Cli, run: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    told = zowrap_cli("replay", models["encoder"], run, "--to", tmp_path / "again", "--json")
    assert told.code == 0, told.err
    assert told.json["steps"] == 3
    first, second = (load_file(path / "model.safetensors") for path in (run, tmp_path / "again"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_a_pickled_model_is_converted_when_allowed(
    zowrap_cli: Cli, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(models["encoder"], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    told = zowrap_cli("export", pickled, "--to", tmp_path / "out")
    assert told.code == 2 and "--allow-pickle" in told.err
    assert zowrap_cli("export", pickled, "--to", tmp_path / "out", "--allow-pickle").code == 0
    measured = [
        zowrap_cli("eval", model, "--data", data["test"], "--json").json
        for model in (models["encoder"], tmp_path / "out")
    ]
    assert measured[0] == measured[1]


@pytest.fixture
def hub(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models that stands for the hub; ``org/pickled`` has its weights as a pickle."""
    import fnmatch

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    root = tmp_path / "hub"
    shutil.copytree(models["encoder"], root / "org" / "whole")
    shutil.copytree(models["encoder"], root / "org" / "pickled")
    weights = root / "org" / "pickled" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        if not (root / name).is_dir():
            raise LocalEntryNotFoundError("Cannot find the requested files in the disk cache.")
        cache = tmp_path / "cache" / name
        cache.mkdir(parents=True, exist_ok=True)
        for file in (root / name).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_a_model_of_the_hub_is_fetched_and_converted(
    zowrap_cli: Cli, hub: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    told = zowrap_cli("export", "org/pickled", "--to", tmp_path / "out")
    assert told.code == 2 and "zowrap export org/pickled --to DIR --allow-pickle" in told.err
    assert not (tmp_path / "cache/org/pickled/pytorch_model.bin").exists()
    wanted = load_file(models["encoder"] / "model.safetensors")
    for name in ("pickled", "whole"):
        told = zowrap_cli("export", f"org/{name}", "--to", tmp_path / name, "--allow-pickle")
        assert told.code == 0, told.err
        made = load_file(tmp_path / name / "model.safetensors")
        assert made.keys() == wanted.keys() and all(made[n].equal(wanted[n]) for n in made)
        assert (tmp_path / name / "tokenizer.json").is_file()
    told = zowrap_cli("export", "org/nothing", "--to", tmp_path / "x", "--allow-pickle")
    assert told.code == 2 and "could not be loaded from the hub" in told.err and "HF_TOKEN" in told.err
    assert "loading torch, then org/nothing from the hub" in told.err
    (hub / "org" / "pickled" / "pytorch_model.bin").unlink()
    shutil.rmtree(tmp_path / "cache")
    told = zowrap_cli("export", "org/pickled", "--to", tmp_path / "x", "--allow-pickle")
    assert told.code == 2 and "holds no weights" in told.err
    assert not (tmp_path / "x").exists()


def test_wrong_input(zowrap_cli: Cli, run: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        (("export", run), "give --to DIR"),
        (("export", tmp_path / "nowhere", "--to", tmp_path / "x"), "no such run"),
        (("export", run, "--to", tmp_path / "full"), "is not empty"),
        (("export", run, "--to", tmp_path / "x", "--dtype", "float31"), "did you mean 'float32'?"),
        (("replay", models["encoder"], run), "give --to DIR"),
        (("replay", models["encoder"], run, "--to", tmp_path / "full"), "is not empty"),
        (("replay", models["encoder"], tmp_path / "nowhere", "--to", tmp_path / "x"), "no such run"),
        (("replay", models["encoder"], tmp_path / "full", "--to", tmp_path / "x"), "is not a run"),
        (("replay", run, run, "--to", tmp_path / "x"), "starts from other weights"),
    ):
        told = zowrap_cli(*arguments)
        assert told.code == 2 and message in told.err.splitlines()[-1], told.err
    assert not (tmp_path / "x").exists()
