"""What holds for every command: help, exit codes, one JSON object, and the small commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome

Cli = Callable[..., Outcome]
COMMANDS = ("tune", "eval", "export", "replay", "inspect", "rules", "env")


@pytest.mark.parametrize("command", ["", *COMMANDS, "train"])
def test_help(zowrap_cli: Cli, command: str) -> None:
    told = zowrap_cli(*filter(None, (command, "--help")))
    assert told.code == 0 and "Usage" in told.out


def test_help_lists_the_commands_and_hides_aliases(zowrap_cli: Cli) -> None:
    told = zowrap_cli("--help")
    assert all(f"│ {name} " in told.out for name in COMMANDS) and "│ train" not in told.out
    told = zowrap_cli("tune", "--help")
    assert "--lr " in told.out and "--learning-rate" not in told.out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom zowrap.cli import main\n"
        "for command in ([], ['tune'], ['eval'], ['inspect'], ['env']):\n    main([*command, '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("arguments", [("fine-tune",), ("tune", "--nope"), ("eval",), ("tune", "a", "b")])
@pytest.mark.parametrize("as_json", [False, True])
def test_usage_errors(zowrap_cli: Cli, arguments: tuple[str, ...], as_json: bool) -> None:
    told = zowrap_cli(*arguments, *(["--json"] if as_json else []))
    assert told.code == 2
    if as_json:
        assert set(told.json) == {"error"}
    else:
        assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("group", "sentence"), [((), "zowrap needs a command: "), (("bench",), "zowrap bench needs a")]
)
def test_a_group_without_a_command_prints_its_help_and_what_is_missing(
    zowrap_cli: Cli, group: tuple[str, ...], sentence: str
) -> None:
    told = zowrap_cli(*group)
    assert told.code == 2 and "Usage: " in told.out
    assert told.err.startswith(f"error: {sentence}") and told.err.count("\n") == 1


def test_our_own_failures_exit_with_1(zowrap_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import zowrap.rules
    from zowrap.errors import ZOInternalError

    def break_down(*_: object) -> None:
        raise ZOInternalError("an invariant is broken")

    monkeypatch.setattr(zowrap.rules.Entry, "summary", break_down)
    told = zowrap_cli("rules")
    assert told.code == 1 and "an invariant is broken" in told.err and "Traceback" not in told.err
    assert "ZOWRAP_DEBUG=1" in told.err
    monkeypatch.setenv("ZOWRAP_DEBUG", "1")
    assert "Traceback" in zowrap_cli("rules").err
    assert "an invariant is broken" in zowrap_cli("rules", "--json").json["error"]


def test_interrupts_exit_with_130(zowrap_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import zowrap.rules

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zowrap.rules.Entry, "summary", press)
    assert zowrap_cli("rules").code == 130
    told = zowrap_cli("rules", "--json")
    assert told.code == 130 and told.json == {"error": "interrupted"}


def test_rules(zowrap_cli: Cli) -> None:
    from zowrap.rules import REGISTRY

    assert [rule["name"] for rule in zowrap_cli("rules", "--json").json["rules"]] == list(REGISTRY)
    told = zowrap_cli("rules")
    assert "meazo: " in told.out and "zo_sgd (also mezo)" in told.out and told.err == ""


def test_env(zowrap_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    record = zowrap_cli("env", "--json").json
    assert record["packages"]["torch"] and record["devices"] and record["works"]["Parquet"]
    assert not any("8-bit" in part for part in record["works"])
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert zowrap_cli("env", "--json").json["works"]["compiled engine"].startswith("no: no C++ compiler")
    assert "compiled engine" in zowrap_cli("env").out


def test_our_warnings_are_lines_wherever_they_come_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from zowrap.cli.console import quiet_libraries
    from zowrap.errors import ZOWarning

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    quiet_libraries()
    warnings.warn_explicit("4 GPUs are visible, one is used", ZOWarning, "/somewhere/cli/tune.py", 1)
    warnings.warn_explicit("zowrap is not our concern", UserWarning, "/site-packages/zowrap/of/others.py", 1)
    assert capsys.readouterr().err == "warning: 4 GPUs are visible, one is used\n"


def test_inspect(zowrap_cli: Cli, models: dict[str, Path]) -> None:
    told = zowrap_cli("inspect", models["causal"], "--json")
    assert told.code == 0, told.err
    assert told.json["model"] == str(models["causal"])
    assert zowrap_cli("inspect", models["causal"], "--blocks", "layer").code == 0
    told = zowrap_cli("inspect", models["causal"], "--trainable", "no.such")
    assert told.code == 2 and "nothing is left to tune" in told.err


def test_stdout_is_one_object_whatever_libraries_print(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    """As a process: libraries print to stdout, a child process writes to file descriptor 1."""
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import os, subprocess, sys\nimport zowrap.tasks.classification as c\nbuild = c.Classification.build\n"
        "def loud(*a, **k):\n    print('chatter')\n    os.write(1, b'low chatter')\n"
        "    subprocess.run(['echo', 'child chatter'])\n    return build(*a, **k)\n"
        "c.Classification.build = loud\nfrom zowrap.cli import main\nsys.exit(main())\n"
    )
    files = ("--data", data["train"], "--eval-data", data["test"], "--out", tmp_path / "run")
    command = [sys.executable, noisy, "tune", models["encoder"], *files, "--engine", "eager", "--steps", "2", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["steps"] == 2
    assert "chatter" in done.stderr and "low chatter" in done.stderr and "child chatter" in done.stderr
