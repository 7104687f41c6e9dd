"""A rule from elsewhere: what can be registered, where it is found, and that everything then takes it up."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zowrap
from zowrap import rules, testing
from zowrap.errors import ZOError, ZOWarning
from zowrap.names import RULES_OF_PACKAGES
from zowrap.rules import Rule, Slot, entry_points, plugins, validation
from zowrap.rules.base import mean_gradient
from zowrap.training.replay import replay_run

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "my_rule.py"
DOCS = (ROOT / "docs" / "new-rule.md").read_text(encoding="utf-8")
QUICK = ("--steps", "4", "--batch-size", "4", "--engine", "eager")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test starts from the library's own rules, with no plugin loaded."""
    before, modules = dict(rules.REGISTRY), set(sys.modules)
    yield
    rules.REGISTRY.clear()
    rules.REGISTRY.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("zowrap_plugin_") or name == "my_rule":
            del sys.modules[name]


def mine(*, lr: float = 1e-3, beta: float = 0.9) -> Rule:
    """A rule of mine."""

    def scalars(state, probe, hyper):
        return state, {"g": mean_gradient(probe)}

    def leaf(w, g, slots, c, hyper):
        m = beta * slots["m"] + g
        return w - hyper["lr"] * m, {"m": m}

    return Rule(name="mine", lr=lr, hyper={"beta": beta}, scalars=scalars, leaf=leaf, slots={"m": Slot()})


# --- the example and its page --------------------------------------------------------------------------------------


def test_the_example_is_its_formula() -> None:
    plugins.import_plugins([str(EXAMPLE)])
    zm = testing.wrap("zo_lion")
    w, m = testing._weights(zm), 0.0
    for losses in testing.draw_losses(zm, 5):
        (query,) = zm.directions.queries
        z = torch.cat([zm.engine.direction(query, i).double().reshape(-1) for i in range(len(zm.parameters))])
        g = (losses[0] - losses[1]).double() / (2 * testing.EPS) * z
        w, m = w - testing.LR * torch.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g
        zm.update(losses=losses)
    assert torch.allclose(testing._weights(zm), w, atol=1e-6)


def test_the_page_shows_the_example() -> None:
    code = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert code[0] == EXAMPLE.read_text(encoding="utf-8")
    body = [line for line in code[0].partition("def ")[2].splitlines() if line.strip()]
    assert len(body) <= 20, "about 20 lines"


@pytest.mark.slow
def test_the_python_on_the_page_runs(monkeypatch) -> None:
    _, test = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    names: dict = {}
    exec(compile(test, "new-rule.md", "exec"), names)
    names["test_my_rule"]()


def test_the_commands_on_the_page_run(zowrap_cli, models, data, tmp_path) -> None:
    commands = re.findall(r"^\$ zowrap (.*?)(?:\s+#.*)?$", DOCS, re.M)
    assert {command.split()[0] for command in commands} == {"rules", "tune", "replay"}
    names = {
        "MODEL": models["encoder"],
        "RUN": tmp_path / "run",
        "DIR": tmp_path / "to",
        "train.jsonl": data["train"],
        "my_rule.py": EXAMPLE,
    }
    for command in commands:
        words = [str(names.get(word, word)) for word in shlex.split(command)]
        words += QUICK if words[0] == "tune" and "--resume" not in words else ()
        told = zowrap_cli(*words)
        assert told.code == 0, (command, told.err[-2000:])


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_command_line_takes_it_up_and_never_by_itself(zowrap_cli, models, data, tmp_path, monkeypatch) -> None:
    run, command = tmp_path / "run", ("tune", models["encoder"], "--data", data["train"], "--rule", "zo_lion", *QUICK)
    refused = zowrap_cli(*command, "--out", run)
    assert refused.code == 2 and "unknown rule 'zo_lion'" in refused.err and not run.exists()

    told = zowrap_cli(*command, "--rule-option", "beta1=0.5", "--plugin", EXAMPLE, "--out", run, "--json")
    assert told.code == 0 and told.json["rule"] == "zo_lion", told.err
    assert "zo_lion(beta1=0.5, beta2=0.99)" in told.err
    tuned = (run / "model.safetensors").read_bytes()
    listed = zowrap_cli("rules", "--json").json["rules"][-1]
    assert listed["name"] == "zo_lion" and listed["memory_measured"] == pytest.approx(1, abs=0.01)

    # Another process, which knows nothing of the plugin: the run names it, and it is not imported for that.
    del rules.REGISTRY["zo_lion"]
    del sys.modules["zowrap_plugin_my_rule"]
    replay = ("replay", models["encoder"], run, "--to", tmp_path / "to")
    refused = zowrap_cli(*replay)
    assert refused.code == 2 and refused.err.count("error: ") == 1
    assert "trained with the rule 'zo_lion', which is not registered here" in refused.err
    assert f"--plugin (then: {EXAMPLE})" in refused.err and "zo_lion" not in rules.REGISTRY
    with pytest.raises(ZOError, match="import it first in Python"):
        replay_run(torch.nn.Linear(1, 1), run)
    assert not (tmp_path / "to").exists()
    told = zowrap_cli(*replay, "--plugin", EXAMPLE)
    assert told.code == 0, told.err
    assert (tmp_path / "to" / "model.safetensors").read_bytes()[-4096:] == tuned[-4096:]


def test_a_run_of_it_resumes_bitwise_with_the_plugin_and_says_so_without(zowrap_cli, models, data, tmp_path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    command = ("tune", models["encoder"], "--data", data["train"], "--rule", "zo_lion", *QUICK, "--plugin", EXAMPLE)
    for out in (whole, half):
        assert zowrap_cli(*command, "--out", out).code == 0
    settings = json.loads((half / "zowrap.json").read_text())
    settings["status"] = {"state": "running"}  # as a kill after the third step leaves it
    (half / "zowrap.json").write_text(json.dumps(settings))
    journal = (half / "journal.jsonl").read_text().splitlines(keepends=True)
    (half / "journal.jsonl").write_text("".join(journal[:4]))
    for checkpoint in half.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > 2:
            shutil.rmtree(checkpoint)

    del rules.REGISTRY["zo_lion"]
    del sys.modules["zowrap_plugin_my_rule"]
    before = {file: file.read_bytes() for file in half.rglob("*") if file.is_file()}
    refused = zowrap_cli("tune", "--resume", "--out", half)
    assert refused.code == 2 and refused.err.count("error: ") == 1 and "--plugin (then: " in refused.err
    assert {file: file.read_bytes() for file in half.rglob("*") if file.is_file()} == before
    told = zowrap_cli("tune", "--resume", "--out", half, "--plugin", EXAMPLE, "--json")
    assert told.code == 0 and 0 < told.json["steps_run"] < 4, told.err
    assert (half / "journal.jsonl").read_text() == (whole / "journal.jsonl").read_text()
    assert (half / "model.safetensors").read_bytes()[-4096:] == (whole / "model.safetensors").read_bytes()[-4096:]


def test_it_can_be_a_module(zowrap_cli, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    names = [each["name"] for each in zowrap_cli("rules", "--plugin", "my_rule", "--json").json["rules"]]
    assert names[-1] == "zo_lion"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("x = 1\n", "registers no rule (call zowrap.rules.register"),
        ("def (\n", "SyntaxError"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("from zowrap import rules\nrules.register('meazo', rules.fzoo, paper='x')\n", "already a rule 'meazo'"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(zowrap_cli, tmp_path, text, words) -> None:
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    before = dict(rules.REGISTRY)
    refused = zowrap_cli("rules", "--plugin", file)
    assert refused.code == 2 and refused.err.startswith(f"error: --plugin {file}") and refused.err.count("\n") == 1
    assert words in refused.err and before == rules.REGISTRY


def test_a_module_that_is_not_there_is_named(zowrap_cli) -> None:
    refused = zowrap_cli("rules", "--plugin", "no.such.module")
    assert refused.code == 2 and "no file or module of that name" in refused.err


# --- installed packages --------------------------------------------------------------------------------------------


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A package as pip leaves it, with an entry point, first on the path."""
    info = tmp_path / "my_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zowrap.rules]\nzo_lion = my_rule\n")
    (tmp_path / "my_rule.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(entry_points, "_installed_loaded", False)


def test_an_installed_package_is_found_when_its_rule_is_asked_for(tmp_path, monkeypatch, zowrap_cli) -> None:
    installed(tmp_path, monkeypatch, EXAMPLE.read_text(encoding="utf-8"))
    assert [p.value for p in importlib.metadata.entry_points(group=RULES_OF_PACKAGES)] == ["my_rule"]
    assert rules.get("meazo").name == "meazo" and "my_rule" not in sys.modules  # only when it is needed
    assert testing.wrap("zo_lion").rule.name == "zo_lion"
    assert zowrap_cli("rules", "--json").json["rules"][-1]["name"] == "zo_lion"


def test_an_installed_package_that_fails_is_left_out_and_named(tmp_path, monkeypatch, zowrap_cli) -> None:
    installed(tmp_path, monkeypatch, "raise OSError('no licence')\n")
    told = zowrap_cli("rules")
    assert told.code == 0 and "warning: cannot load the rules of my-rules (my_rule): OSError: no licence" in told.err
    monkeypatch.setattr(entry_points, "_installed_loaded", False)
    with pytest.warns(ZOWarning, match="my-rules"), pytest.raises(ZOError, match="unknown rule 'zo_lion'"):
        rules.get("zo_lion")


# --- what can be registered ----------------------------------------------------------------------------------------


def test_a_registered_rule_is_a_rule() -> None:
    rules.register("mine", mine, paper="a note", scale_free=False)
    entry = rules.REGISTRY["mine"]
    assert (entry.memory, entry.forwards, entry.summary()) == ("1", "2q", "A rule of mine.")
    assert rules.get("mine", beta=0.5).describe() == "mine(beta=0.5)"
    assert testing.wrap("mine").inspect().paper == "a note"
    assert zowrap.ZOConfig(rule="mine", output_dir="x").learning_rate == 1e-3
    rules.register("mine", mine, paper="a second note")  # as when a notebook's cell is run again
    assert rules.REGISTRY["mine"].paper == "a second note"


def other(*, lr: float = 1e-3) -> Rule:
    """Another."""
    return mine(lr=lr)


def bare(*, lr=1e-3):
    return mine(lr=lr)


def positional(lr: float = 1e-3, beta: float = 0.9) -> Rule:
    """Positional."""
    return mine(lr=lr, beta=beta)


def without_default(*, lr: float, beta: float = 0.9) -> Rule:
    """No default."""
    return mine(lr=lr, beta=beta)


def anything(**hyper: float) -> Rule:
    """Anything."""
    return mine(**hyper)


def failing(*, lr: float = 1e-3) -> Rule:
    """Fails."""
    raise KeyError("beta")


def no_rule(*, lr: float = 1e-3) -> str:
    """A string."""
    return "rule"


def unsaid(*, lr: float = 1e-3, beta: float = 0.9, gamma: float = 0.1) -> Rule:
    """Does not record gamma."""
    return mine(lr=lr, beta=beta)


def not_plain(*, lr: float = 1e-3, beta: tuple = (0.9, 0.99)) -> Rule:
    """Not JSON's."""
    return Rule(name="mine", lr=lr, hyper={"beta": beta}, scalars=mine().scalars, leaf=mine().leaf, slots=mine().slots)


@pytest.mark.parametrize(
    ("name", "constructor", "words"),
    [
        ("meazo", mine, "there is already a rule 'meazo'"),
        ("meazo", rules.meazo, "there is already a rule 'meazo'"),
        ("mezo", mine, "an alias of zo_sgd"),
        ("Mine", mine, "lowercase letters"),
        ("", mine, "lowercase letters"),
        (3, mine, "lowercase letters"),
        ("mine", "mine", "must be a function that returns a rule"),
        ("mine", mine(), "must be a function that returns a rule"),
        ("mine", dict, "must be a Python function|keyword-only"),
        ("mine", positional, "must be a keyword-only argument with a default"),
        ("mine", without_default, "must be a keyword-only argument with a default"),
        ("mine", anything, "must be a keyword-only argument with a default"),
        ("mine", bare, "needs a docstring"),
        ("mine", failing, "fails without arguments .KeyError: 'beta'."),
        ("mine", no_rule, "must return a zowrap.rules.Rule, got str"),
        ("yours", mine, "a rule called 'mine'"),
        ("mine", unsaid, r"Rule.hyper=....\ must contain gamma"),
        ("mine", other, "its constructor must take beta"),
        ("mine", not_plain, "must be numbers, strings, flags or None"),
    ],
)
def test_what_cannot_be_registered_is_named_and_nothing_is(name, constructor, words) -> None:
    before = dict(rules.REGISTRY)
    with pytest.raises(ZOError, match=words):
        rules.register(name, constructor, paper="nobody")
    assert before == rules.REGISTRY


@pytest.mark.parametrize("paper", ["", " ", None, 3])
def test_a_rule_says_where_it_is_from(paper) -> None:
    with pytest.raises(ZOError, match="paper must name the rule's source"):
        rules.register("mine", mine, paper=paper)
    assert "mine" not in rules.REGISTRY


def test_costs_are_read_off_the_rule() -> None:
    for name, entry in rules.REGISTRY.items():
        rule = entry.constructor()
        assert validation.describe_forwards(rule) == entry.forwards, name
