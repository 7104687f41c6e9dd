"""What is wrong without a model being opened is told before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outcome, reviews, write_rows
from zowrap import names

# Each command line in a process of its own (a fork, which costs nothing), with what it said and whether torch came.
RUNNER = """
import io, json, os, sys
from zowrap.cli import main
for line in sys.stdin:
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        out, err = io.StringIO(), io.StringIO()
        sys.stdout, sys.stderr = out, err
        code = main(json.loads(line))
        heavy = [name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules]
        with os.fdopen(write, "w") as pipe:
            json.dump([code, out.getvalue(), err.getvalue(), heavy], pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        print(pipe.read(), flush=True)
    os.wait()
"""

TUNE = ("tune", "MODEL", "--data", "train.jsonl", "--out", "new")
EVAL = ("eval", "MODEL", "--data", "train.jsonl")
INSPECT = ("inspect", "MODEL")
REPLAY = ("replay", "MODEL", "run")

WRONG: list[tuple[tuple[Any, ...], str]] = [
    (("tune",), "which model?"),
    (("tune", "MODEL"), "give --data FILE"),
    (("tune", "MODEL", "--data", "train.jsonl"), "give --out RUN"),
    (("tune", "./nowhere", *TUNE[2:]), "no such model directory: ./nowhere"),
    (("tune", "train.jsonl", *TUNE[2:]), "train.jsonl is a file"),
    (("tune", "empty", *TUNE[2:]), "empty is not a model directory: it has no config.json"),
    (("tune", "pickled", *TUNE[2:]), "zowrap export pickled --to DIR --allow-pickle"),
    (("tune", "hollow", *TUNE[2:]), "hollow holds no weights"),
    ((*TUNE, "--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
    ((*TUNE, "--data", "empty"), "empty is a directory"),
    ((*TUNE, "--data", "rows.bin"), "rows.bin: the format is not known by its name"),
    ((*TUNE, "--data", "none.jsonl"), "none.jsonl is empty"),
    ((*TUNE, "--data", "broken.jsonl"), "broken.jsonl line 1 is not valid JSON"),
    ((*TUNE, "--eval-data", "nowhere.csv"), "no such file: nowhere.csv"),
    ((*TUNE, "--text-column", "body"), "line 1 has no column 'body' (columns: label, text)"),
    ((*TUNE, "--label-column", "kind"), "line 1 has no column 'kind'"),
    ((*TUNE, "--out", "full"), "--out full exists and is not empty"),
    ((*TUNE, "--out", "train.jsonl"), "--out train.jsonl is a file"),
    ((*TUNE, "--out", "MODEL"), "--out MODEL is the model's own directory"),
    ((*TUNE, "--rule", "meazzo"), "unknown rule 'meazzo'; did you mean 'meazo'?"),
    ((*TUNE, "--rule", "xyz"), "a rule of your own must be registered first, on the command line by --plugin"),
    ((*TUNE, "--plugin", "nowhere.py"), "--plugin nowhere.py: there is no such file"),
    ((*TUNE, "--rule-option", "beta"), "--rule-option takes name=value, got 'beta'"),
    ((*TUNE, "--rule-option", "lr=1"), "the learning rate has an option of its own: --lr"),
    ((*TUNE, "--task", "lmm"), "unknown --task 'lmm'; did you mean 'lm'?"),
    ((*TUNE, "--head", "word"), "unknown --head 'word'; did you mean 'words'?"),
    ((*TUNE, "--dtype", "bfloat"), "unknown --dtype 'bfloat'; did you mean 'bfloat16'?"),
    ((*TUNE, "--engine", "compile"), "unknown --engine 'compile'; did you mean 'compiled'?"),
    ((*TUNE, "--estimator", "centre"), "unknown --estimator 'centre'; did you mean 'central'?"),
    ((*TUNE, "--memory", "pair"), "unknown --memory 'pair'; did you mean 'paired'?"),
    ((*TUNE, "--along", "draw"), "unknown --along 'draw'; did you mean 'drawn'?"),
    ((*TUNE, "--quantized", "scale"), "unknown --quantized 'scale'; did you mean 'scales'?"),
    ((*TUNE, "--lr-schedule", "cosin"), "unknown --lr-schedule 'cosin'; did you mean 'cosine'?"),
    ((*TUNE, "--block-order", "ascend"), "unknown --block-order 'ascend'; did you mean 'ascending'?"),
    ((*TUNE, "--lr", "fast"), "--lr must be a positive finite number or auto, got fast"),
    ((*TUNE, "--lr", "-1"), "--lr must be a positive finite number or auto, got -1"),
    ((*TUNE, "--eps", "0"), "--eps must be a positive finite number, got 0.0"),
    ((*TUNE, "--queries", "0"), "--queries must be a whole number from 1, got 0"),
    ((*TUNE, "--weight-decay", "nan"), "--weight-decay must be a finite number from 0, got nan"),
    ((*TUNE, "--labels", "good,,bad"), "has an empty name"),
    ((*TUNE, "--lora-r", "4"), "--lora-r does nothing without --use-peft"),
    ((*TUNE, "--task", "lm", "--labels", "a,b"), "--labels does nothing with --task lm"),
    ((*TUNE, "--eval-every", "5"), "--eval-every does nothing without --eval-data"),
    ((*TUNE, "--load-in-8bit", "--load-in-4bit"), "two ways to load a model"),
    *(
        ((*TUNE, f"--{name}", limit - 1), f"--{name} must be at least {limit}, got {limit - 1}")
        for name, limit in (("steps", 1), ("batch-size", 1), ("grad-accum", 1), ("warmup-steps", 0), ("eval-every", 1),
                            ("eval-batch-size", 1), ("max-eval-examples", 1), ("save-every", 1), ("seed", 0),
                            ("save-total-limit", 0), ("max-length", 2), ("show-examples", 0))
    ),
    (("tune", "--resume"), "which run is to go on? give --out RUN"),
    (("tune", "--resume", "--out", "full"), "full is not a run: there is no zowrap.json in it"),
    (("tune", "--resume", "--out", "nowhere"), "there is no run in nowhere to go on with"),
    (("tune", "--resume", "--overwrite", "--out", "run"), "give one of them"),
    (EVAL[:2], "give --data FILE"),
    ((*EVAL, "--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
    ((*EVAL, "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
    ((*EVAL, "--task", "lmm"), "unknown --task 'lmm'"),
    (("eval", "./nowhere", *EVAL[2:]), "no such model directory: ./nowhere"),
    (("eval", "run", *EVAL[2:], "--task", "lm"), "run was tuned for classification, not for --task lm"),
    (("eval", "begun", *EVAL[2:]), "begun holds no finished model yet"),
    (("export", "MODEL"), "give --to DIR"),
    (("export", "./nowhere", "--to", "new"), "no such run or model directory: ./nowhere"),
    (("export", "MODEL", "--to", "full"), "full is not empty"),
    (("export", "MODEL", "--to", "new", "--format", "fp16"), "unknown --format 'fp16'"),
    (("export", "MODEL", "--to", "new", "--dtype", "half"), "unknown --dtype 'half'"),
    (("export", "begun", "--to", "new"), "begun holds no finished model yet"),
    (("export", "hollow", "--to", "new"), "hollow holds no weights"),
    (REPLAY, "give --to DIR"),
    ((*REPLAY, "--to", "full"), "--to full is not empty"),
    (("replay", "MODEL", "nowhere", "--to", "new"), "no such run: nowhere"),
    (("replay", "MODEL", "full", "--to", "new"), "full is not a run"),
    ((*REPLAY, "--to", "new"), "there is no journal at run/journal.jsonl"),
    (("inspect", "./nowhere"), "no such model directory: ./nowhere"),
    ((*INSPECT, "--rule", "zo_sdg"), "unknown rule 'zo_sdg'; did you mean 'zo_sgd'?"),
    ((*INSPECT, "--max-length", "1"), "--max-length must be at least 2, got 1"),
    ((*INSPECT, "--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
    ((*INSPECT, "--html", "nowhere/step.html"), "--html nowhere/step.html cannot be written"),
    (("bench", "step", "--rounds", "0"), "--rounds must be from 1, got 0"),
]  # fmt: skip


def files(folder: Path) -> None:
    """A model without weights that can be read, data, runs in several states."""
    for name in ("MODEL", "pickled", "hollow", "run", "begun"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    for name in ("MODEL", "run"):
        (folder / name / "model.safetensors").write_bytes(b"")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("do not lose me")
    write_rows(folder / "train.jsonl", reviews(4))
    (folder / "none.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "rows.bin").write_bytes(b"rows")
    run = {"options": {"rule": "meazo", "model": "MODEL"}, "task": {"kind": "classification"}}
    result = {"out": "run", "steps": 4, "loss": 1.5}
    for name, status in (("run", {"state": "finished", "result": result}), ("begun", {"state": "running"})):
        (folder / name / "zowrap.json").write_text(json.dumps({**run, "status": status}))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Outcome, list[str]]]:
    """What a command line comes to, and the heavy packages that it imported."""
    folder = tmp_path_factory.mktemp("wrong")
    files(folder)
    calls = [[str(word) for word in call] for call in [*(call for call, _ in WRONG), FINISHED]]
    lines = "".join(json.dumps(call) + "\n" for call in calls)
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=folder, timeout=120, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls), done.stderr
    found = {tuple(call): (Outcome(*answer[:3]), answer[3]) for call, answer in zip(calls, answers, strict=True)}
    return lambda *call: found[tuple(str(word) for word in call)]


FINISHED = ("tune", "--resume", "--out", "run")


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[" ".join(map(str, call)) for call, _ in WRONG])
def test_a_wrong_call_is_refused_without_torch(told: Any, call: tuple[Any, ...], sentence: str) -> None:
    outcome, heavy = told(*call)
    assert outcome.code == 2 and outcome.out == "", outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and sentence in outcome.err, outcome.err
    assert heavy == []


def test_a_finished_run_says_so_without_torch(told: Any) -> None:
    outcome, heavy = told(*FINISHED)
    assert outcome.code == 0 and "run is finished: nothing is left to do" in outcome.err, outcome
    assert outcome.out == "run: 4 steps, loss 1.5000\n" and heavy == []


def test_the_names_are_those_that_there_are() -> None:
    from zowrap import rules
    from zowrap.rules import estimators
    from zowrap.tasks import classification, resolve

    assert tuple(estimators.ESTIMATORS) == names.ESTIMATORS
    assert tuple(resolve.TASKS) == names.TASKS
    assert set(names.FORMS) == set(classification.TEMPLATES)
    assert all(rules.get(name).name == names.RULE_ALIASES.get(name, name) for name in [*names.RULES, *rules.ALIASES])


def test_a_registered_rule_is_no_mistake(
    zowrap_cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from zowrap import rules

    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rules.REGISTRY, "my_rule", rules.REGISTRY["meazo"])
    told = zowrap_cli(*TUNE, "--rule", "my_rule", "--steps", "0")
    assert "--steps must be at least 1" in told.err


def test_a_good_start_says_at_once_what_it_does(
    zowrap_cli: Callable[..., Outcome], models: dict[str, Path], data: dict[str, Path]
) -> None:
    told = zowrap_cli("eval", models["sequence"], "--data", data["test"])
    assert told.code == 0, told.err
    first = told.err.splitlines()[0]
    assert first.startswith("zowrap ") and str(models["sequence"]) in first and str(data["test"]) in first
