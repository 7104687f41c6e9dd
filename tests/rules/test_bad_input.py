"""A bad hyper-parameter, or a state of something else: one sentence that names it, and nothing is changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zowrap
from tests.support.rule_cases import CASES, KINDS, name_of
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.testing import draw_losses, wrap

NAN, INF = math.nan, math.inf

# --- hyper-parameters ----------------------------------------------------------------------------------------------

# Out of range for every hyper-parameter with such a default: all numbers of all rules are from 0.
ANYWHERE: list[Any] = [NAN, INF, -INF, -1, "0.5", "", [0.5], {"beta": 0.5}, 1j]
BY_TYPE: dict[type, list[Any]] = {
    bool: ["no", None, 0.5, 2.5],
    int: [1.5, True, None],
    float: [True, False, None],
    str: ["no_such_word", None, 1, True],
    type(None): ["no_such_word", 1, True],
}
# The upper or lower ends that differ from one to the next.
ENDS: dict[str, list[float]] = {
    "lr": [0, 0.0, 1e-60, 1e39],  # the last two are 0 and infinity in float32
    "zeta": [0, 0.0, 1e-60, 10**400],
    "momentum": [1, 1.0, 1.5],
    "beta": [1, 1.0, 1.5],
    "beta1": [1, 1.0, 1.5],
    "beta2": [1, 1.0, 1.5],
    "a": [1, 1.0, 1.5],
    "sparsity": [1, 1.0, 1.5],
    "rank": [0],
    "nu": [0],
    "theta": [0, 1.6, math.pi],
    "warmup": [0, True],
}


def bad_values() -> list[Any]:
    return [
        pytest.param(rule, name, value, id=f"{rule}-{name}={value!r}")
        for rule, entry in rules.REGISTRY.items()
        for name, default in entry.defaults().items()
        for value in (*ANYWHERE, *BY_TYPE[type(default)], *ENDS.get(name, ()))
    ]


@pytest.mark.parametrize(("rule", "name", "value"), bad_values())
def test_a_value_out_of_range_is_named(rule: str, name: str, value: Any) -> None:
    for build in (lambda: rules.get(rule, **{name: value}), lambda: rules.REGISTRY[rule].constructor(**{name: value})):
        with pytest.raises(ZOError) as refused:
            build()
        sentence = str(refused.value)
        assert sentence.startswith(f"{rule}: ") and name in sentence and "\n" not in sentence
        assert repr(value) in sentence


def test_every_number_has_its_ends_tried() -> None:
    numbers = {n for e in rules.REGISTRY.values() for n, v in e.defaults().items() if type(v) is float}
    assert numbers <= set(ENDS)


@pytest.mark.parametrize("rule", rules.REGISTRY)
def test_values_at_the_ends_of_the_range_are_taken(rule: str) -> None:
    """So that the refusals above refuse no more than they should."""
    for name, default in rules.REGISTRY[rule].defaults().items():
        if type(default) is float:
            assert rules.get(rule, **{name: 0.5}).name == rule
        if name.startswith("beta") or name in ("momentum", "a"):
            assert rules.get(rule, **{name: 0}).hyper[name] == 0


@pytest.mark.parametrize("rule", rules.REGISTRY)
def test_a_hyper_parameter_that_a_rule_does_not_have_is_named(rule: str) -> None:
    known = rules.REGISTRY[rule].defaults()
    others = {name for entry in rules.REGISTRY.values() for name in entry.defaults()} - set(known)
    for name in {*others, "no_such_thing", "LR", "learning_rate", "eps"}:
        with pytest.raises(ZOError, match=f"^{rule} has no hyper-parameter '{name}'; (did you mean|choose one of)"):
            rules.get(rule, **{name: 0.5})


@pytest.mark.parametrize("rule", rules.REGISTRY)
def test_the_trainer_and_the_command_line_refuse_it_too(rule: str, zowrap_cli, models, data, tmp_path) -> None:
    words = f"{rule} has no hyper-parameter 'gamma'"
    with pytest.raises(ZOError, match=words):
        zowrap.ZOConfig(output_dir=str(tmp_path / "run"), rule=rule, rule_options={"gamma": 1})
    with pytest.raises(ZOError, match="lr must be a positive finite number"):
        zowrap.ZOConfig(output_dir=str(tmp_path / "run"), rule=rule, rule_options={"lr": NAN})
    model = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for lr in (0.0, -1e-3, NAN, INF, "1e-3", True):
        with pytest.raises(ZOError, match="lr must be a positive finite number"):
            zowrap.zo_wrap(model, rule, lr=lr, loss_fn=lambda m, b: m.weight.sum())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    command = ("tune", models["encoder"], "--data", data["train"], "--rule", rule, "--out", tmp_path / "run")
    for option in ("gamma=1", "gamma=NaN"):
        refused = zowrap_cli(*command, "--rule-option", option)
        assert refused.code == 2 and refused.err.splitlines()[-1].startswith(f"error: {words}")
        assert refused.err.count("error: ") == 1
    assert not (tmp_path / "run").exists()


# --- states --------------------------------------------------------------------------------------------------------


def everything(zm: Any) -> dict[str, Any]:
    """All that a refused state must leave as it was."""
    weights = {f"model/{name}": tensor for name, tensor in zm.model.state_dict().items()}
    found = {**zm.state_dict(), **weights, "rates": (zm.lr, zm.eps)}
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def refuses(zm: Any, state: Any, words: str) -> None:
    before = everything(zm)
    with pytest.raises(ZOError, match=words) as refused:
        zm.load_state_dict(state)
    assert "\n" not in str(refused.value)
    after = everything(zm)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


def moved(rule: Any, **options: Any) -> Any:
    """A wrapped model three steps on; a rate of its own, so that one taken over by mistake shows."""
    zm = wrap(rule, **options)
    for losses in draw_losses(zm, 3):
        zm.update(losses=losses)
    return zm


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_the_state_of_another_rule_is_refused(case) -> None:
    name, hyper, _ = case
    rule = rules.get(name, **hyper)
    zm = moved(rule)
    # Of the same rule with other hyper-parameters, too: their state is another one's.
    for other_name, other_hyper, _ in CASES:
        other = rules.get(other_name, **other_hyper)
        if other.describe() != rule.describe():
            refuses(zm, wrap(other, lr=0.7).state_dict(), f"this state was saved with rule=.{other_name}")


@pytest.mark.parametrize("name", rules.REGISTRY)
def test_the_state_of_other_options_or_another_model_is_refused(name: str) -> None:
    zm = moved(name)
    queries = zm.state_dict()["queries"]
    refuses(zm, wrap(name, lr=0.7, queries=queries + 1).state_dict(), f"queries={queries + 1}")
    refuses(zm, wrap(name, lr=0.7, blocks="layer").state_dict(), r"blocks=\['layers.0', 'layers.1'\]")
    randomly = wrap(name, lr=0.7, blocks="layer", block_order="random").state_dict()
    refuses(wrap(name, lr=0.7, blocks="layer"), randomly, "block_order='random'")
    refuses(zm, wrap(name, lr=0.7, trainable=["*.weight"]).state_dict(), "another model: its tunable parameters")
    wide = zowrap.zo_wrap(nn.Linear(3, 4), name, engine="eager", loss_fn=lambda m, b: m.weight.sum())
    refuses(zm, wide.state_dict(), "another model: its tunable parameters")
    if name not in ("lozo", "lozo_m"):  # bound to directions of their own
        other = "gaussian" if zm.state_dict()["direction"] == "rademacher" else "rademacher"
        refuses(zm, wrap(name, lr=0.7, direction=other).state_dict(), f"direction='{other}'")
    if name != "hizoo":  # bound to its estimator
        other = "forward" if zm.state_dict()["estimator"] == "central" else "central"
        refuses(zm, wrap(name, lr=0.7, estimator=other).state_dict(), f"estimator='{other}'")


@pytest.mark.parametrize("case", KINDS, ids=name_of)
def test_a_damaged_state_is_refused(case) -> None:
    name, hyper, _ = case
    rule = rules.get(name, **hyper)
    zm, state = moved(rule), moved(rule, lr=0.7).state_dict()
    for key, value in state.items():
        if key != "check_every":  # which states of earlier versions lack
            refuses(zm, {k: v for k, v in state.items() if k != key}, key)
        for bad in (None, b"0.5", NAN, (1,), torch.zeros(3, 3, 3)):
            if bad is not None or value is not None:
                refuses(zm, {**state, key: bad}, key)
        if isinstance(value, torch.Tensor):
            refuses(zm, {**state, key: value.double()}, "float64, not torch.float32")
    refuses(zm, {**state, "slots/q/layers.0.weight": torch.zeros(1)}, "it also holds slots/q/layers.0.weight")
    refuses(zm, {**state, "seed": True}, "its seed is of type bool")
    for other in (None, [], "state", {}):
        refuses(zm, other, "a state is the dictionary|rule is missing")
    zm.load_state_dict(state)  # and whole it is taken
    assert zm.lr == 0.7


# --- checkpoints on the disk ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(models, data, tmp_path_factory) -> Path:
    """A run of conmezo, which has state of both kinds, stopped half way."""
    from zowrap.cli import main

    out = tmp_path_factory.mktemp("bad") / "run"
    command = ("tune", models["encoder"], "--data", data["train"], "--rule", "conmezo", "--engine", "eager")
    more = ("--steps", 4, "--batch-size", 4, "--save-every", 2, "--save-total-limit", 0, "--out", out)
    assert main([str(word) for word in (*command, *more)]) == 0
    stop_after(out, 2)
    assert (out / "checkpoint-2" / "zo_state.safetensors").is_file()
    return out


def stop_after(run: Path, step: int) -> None:
    """Leave a finished run as a kill after that step would have."""
    settings = json.loads((run / "zowrap.json").read_text())
    (run / "zowrap.json").write_text(json.dumps({**settings, "status": {"state": "running"}}))
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(lines[: 1 + step]))
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbled(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 8)


def huge_header(file: Path) -> None:
    file.write_bytes((2**63 - 1).to_bytes(8, "little") + file.read_bytes()[8:])


def a_list(file: Path) -> None:
    file.write_text("[1, 2]")


def without_a_rate(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "lr": None}))


def of_another_rule(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "rule": rules.zo_adam().describe()}))


def renamed_slot(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name.replace("slots/m/", "slots/v/"): tensor for name, tensor in load_file(file).items()}, file)


STATE, TENSORS, TRAINER = "zo_state.json", "zo_state.safetensors", "trainer_state.json"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    *(
        (name, act, "not a complete safetensors file")
        for name in (TENSORS, "model.safetensors")
        for act in (cut, empty)
    ),
    (TENSORS, garbled, "not a complete safetensors file"),
    (TENSORS, huge_header, "not a complete safetensors file"),
    (TENSORS, Path.unlink, "scalars/all/warmup is missing"),
    (TENSORS, renamed_slot, "slots/m/.* is missing"),
    *((name, act, "not valid JSON") for name in (STATE, TRAINER) for act in (cut, empty)),
    (STATE, garbled, "zo_state.json .*(not valid JSON|not UTF-8)"),
    (STATE, a_list, "zo_state.json is damaged"),
    (TRAINER, a_list, "trainer_state.json is damaged"),
    (TRAINER, Path.unlink, "trainer_state.json cannot be read"),
    (STATE, without_a_rate, "its lr is of type NoneType"),
    (STATE, of_another_rule, "saved with rule=.zo_adam"),
]


@pytest.mark.parametrize(("name", "act", "words"), DAMAGE, ids=[f"{name} {act.__name__}" for name, act, _ in DAMAGE])
def test_a_damaged_checkpoint_is_named_and_the_run_left_as_it_is(run, zowrap_cli, tmp_path, name, act, words) -> None:
    import re

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    act(copy / "checkpoint-2" / name)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    refused = zowrap_cli("tune", "--resume", "--out", copy)
    assert refused.code == 2, refused.err
    (sentence,) = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert re.search(words, sentence), sentence
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_the_same_run_undamaged_goes_on(run, zowrap_cli, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    told = zowrap_cli("tune", "--resume", "--out", copy, "--json")
    assert told.code == 0 and told.json["resumed_from"] == 2 and told.json["steps_run"] == 2, told.err
