"""The table of options: whatever is in it reaches every door of a step."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zowrap
from zowrap.cli.inspect import InspectOptions
from zowrap.cli.options import TuneOptions, typer_annotations
from zowrap.errors import Option
from zowrap.step.options import (
    DEFAULTS,
    ENTRIES,
    IDENTITY,
    StepKeywords,
    StepOptions,
    build_options,
    check_values,
    values_of,
)

ROOT = Path(__file__).parents[2]
OPTIONS = [field.name for field in dataclasses.fields(StepOptions)]

# Added to the table, and to nothing else.
THROW_AWAY = """    sparkle: str = option("dim", "How it shines.", identity=True, check=_one_of(("dim", "bright")))

"""
USE = """
import dataclasses, io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import torch
import zowrap
from zowrap.cli import main
from zowrap.training.journal import describe

def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(arguments))
    return [code, out.getvalue(), err.getvalue()]

Path("run.toml").write_text('sparkle = "brigt"')
Path("rows.jsonl").write_text('{"text": "a", "label": "b"}')
Path("model").mkdir()
Path("model/config.json").write_text("{}")
Path("model/model.safetensors").write_bytes(b"")
tune = ("tune", "model", "--data", "rows.jsonl", "--out", "new")
zm = zowrap.zo_wrap(torch.nn.Linear(2, 1), loss_fn=lambda m, b: m(b["x"]).mean(), sparkle="bright")
try:
    zowrap.zo_wrap(torch.nn.Linear(2, 1), sparkle="loud")
except zowrap.ZOError as error:
    refused = str(error)
print(json.dumps({
    "help": run("tune", "--help"), "inspect": run("inspect", "--help"),
    "flag": run(*tune, "--sparkle", "loud"), "file": run(*tune, "--config", "run.toml"),
    "config": zowrap.ZOConfig(output_dir="out", sparkle="bright").sparkle, "refused": refused,
    "header": describe(zm)["sparkle"], "state": zm.state_dict()["sparkle"],
}))
"""


def test_an_option_that_is_added_to_the_table_is_known_everywhere(tmp_path: Path) -> None:
    package, work = tmp_path / "zowrap", tmp_path / "work"
    work.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zowrap", package, ignore=ignored)
    for name in ("passes", "cli"):
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    table = package / "step" / "options.py"
    text = table.read_text(encoding="utf-8")
    last = "\nclass StepKeywords"
    assert text.count(last) == 1
    table.write_text(text.replace(last, THROW_AWAY + last), encoding="utf-8")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for command in ("help", "inspect"):
        assert "--sparkle" in found[command][1] and "How it shines." in found[command][1]
    assert found["flag"][0] == 2 and "unknown --sparkle 'loud'; choose one of bright, dim" in found["flag"][2]
    assert found["file"][0] == 2 and "unknown --sparkle 'brigt'; did you mean 'bright'?" in found["file"][2]
    assert found["config"] == found["header"] == found["state"] == "bright"
    assert found["refused"].startswith("unknown sparkle 'loud'")


def test_every_door_has_every_option_and_its_default() -> None:
    assert set(StepKeywords.__annotations__) == set(OPTIONS) - {"rule"}
    shown = inspect.signature(zowrap.zo_wrap).parameters
    assert {name: shown[name].default for name in OPTIONS} == DEFAULTS
    config = {field.name: field for field in dataclasses.fields(zowrap.ZOConfig)}
    own = {"seed", "lr"}  # the Trainer's seed; two names of the learning rate
    assert {name: config[name].default for name in OPTIONS if name not in own} == {
        name: default for name, default in DEFAULTS.items() if name not in own
    }
    assert all(config[name].metadata["help"] for name in OPTIONS)
    assert set(OPTIONS) <= set(typer_annotations(TuneOptions))
    assert set(OPTIONS) - set(typer_annotations(InspectOptions)) == {n for n in OPTIONS if not ENTRIES[n].costs}


def test_every_option_is_described() -> None:
    documented = zowrap.zo_wrap.__doc__ or ""
    for name, entry in ENTRIES.items():
        assert entry.help.endswith(".") and entry.group
        assert f"        {name}: " in documented


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lr": "fast"}, "lr must be a positive finite number or 'auto', got 'fast'"),
        ({"lr": -1.0}, "lr must be a positive finite number, got -1.0"),
        ({"eps": 0}, "eps must be a positive finite number, got 0"),
        ({"eps": 1e-39}, "eps must lie in the range of float32"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"queries": 0}, "queries must be a whole number from 1, got 0"),
        ({"estimator": "centre"}, "unknown estimator 'centre'; did you mean 'central'?"),
        ({"blocks": "layers"}, "unknown blocks 'layers': use 'layer' or a list of name patterns"),
        ({"blocks": []}, "blocks is empty: give 'layer', a list of name patterns, or None"),
        ({"blocks": 3}, "blocks is 'layer' or a list of name patterns, not 3"),
        ({"block_order": "ascend"}, "unknown block_order 'ascend'; did you mean 'ascending'?"),
        ({"engine": "compile"}, "unknown engine 'compile'; did you mean 'compiled'?"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number from 0, got nan"),
        ({"memory": "pair"}, "unknown memory 'pair'; did you mean 'paired'?"),
        ({"quantized": "scale"}, "unknown quantized 'scale'; did you mean 'scales'?"),
        ({"masters": 1}, "masters must be True or False, got 1"),
        ({"along": "draw"}, "unknown along 'draw'; did you mean 'drawn'?"),
    ],
)
def test_a_wrong_value_is_refused_with_its_option(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(zowrap.ZOError) as refused:
        build_options("meazo", given)
    assert sentence in str(refused.value)
    (name,) = given
    assert next(part.name for part in refused.value.parts if isinstance(part, Option)) == name


def test_an_option_that_is_not_there_is_refused() -> None:
    with pytest.raises(TypeError, match="zo_wrap\\(\\) has no option 'learning_rat'"):
        build_options("meazo", {"learning_rat": 1})
    with pytest.raises(TypeError, match="did you mean 'queries'"):
        build_options("meazo", {"querys": 1})


def test_defaults_pass_their_own_checks_and_survive_a_round_trip() -> None:
    options = StepOptions()
    check_values(options)
    assert StepOptions(**values_of(options)) == options
    assert set(IDENTITY) < set(OPTIONS) and {"lr", "eps", "engine", "memory"}.isdisjoint(IDENTITY)
