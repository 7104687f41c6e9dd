"""What the README shows runs: the Python example and every command, on small models."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from zowrap import rules

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(models, tmp_path, monkeypatch) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 11
    monkeypatch.chdir(tmp_path)
    code = code.replace("facebook/opt-125m", str(models["causal"])).replace("] * 50", "] * 2")
    code = code.replace('rule="meazo"', 'rule="meazo", engine="eager"')
    exec(compile(code, "README.md", "exec"), {})
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_objective_without_a_gradient_is_tuned() -> None:
    import torch

    import zowrap

    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=draw)
    targets = (inputs[:, 0] > 0).long()
    torch.manual_seed(0)
    names = {"zowrap": zowrap, "classifier": torch.nn.Linear(8, 2), "inputs": inputs, "targets": targets}
    exec(compile(code.replace('rule="meazo"', 'rule="meazo", lr=0.02, engine="eager"'), "README.md", "exec"), names)
    zm = names["zm"]
    before = zm.loss(x=inputs, y=targets)
    for _ in range(300):
        zm.step(x=inputs, y=targets)
    assert zm.loss(x=inputs, y=targets) < 0.6 * before


def test_every_command_runs(models, data, tmp_path, zowrap_cli) -> None:
    commands = re.findall(r"^\$ zowrap (.*?)(?:\s+#.*)?$", README, re.M)
    assert len(commands) >= 8
    names = {
        "MODEL": models["sequence"],
        "RUN": tmp_path / "run",
        "train.jsonl": data["train"],
        "dev.jsonl": data["test"],
        "test.jsonl": data["test"],
        "opt-125m": "opt-tiny",
    }
    for number, command in enumerate(commands):
        words = [str(names.get(word, word)) for word in shlex.split(command)]
        words = [str(tmp_path / f"to{number}") if word == "DIR" else word for word in words]
        if "--steps" in words:
            words[words.index("--steps") + 1] = "2"
            words += ["--engine", "eager", "--batch-size", "4"]
        if words[0] == "bench":
            words += ["--batch", "2", "--seq", "8", "--row", "gaussian", "--rounds", "1", "--together"]
        outcome = zowrap_cli(*words)
        assert outcome.code == 0, (command, outcome.err[-2000:])


def test_the_table_of_rules_is_the_registry() -> None:
    for name, entry in rules.REGISTRY.items():
        (row,) = re.findall(rf"^\| `{name}`.*$", README, re.M)
        assert entry.paper in row, name
        assert entry.forwards in row, name
        assert row.split("|")[3].split()[0] == entry.memory.split()[0], name
