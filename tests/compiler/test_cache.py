"""Compiled code is kept between processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zowrap.compiler import cache

JOB = """
import json, torch, zowrap
import zowrap.ops.loops
torch.manual_seed(0)
zm = zowrap.zo_wrap(torch.nn.Linear(6, 3), "meazo", lr=1e-3, engine="compiled",
                    loss_fn=lambda model, batch: model(batch["x"]).square().mean(-1))
kept = []
compiler_run = zowrap.ops.loops.compile_function
def counted(*given, **named):
    made = compiler_run(*given, **named)
    kept.append(made.cached)
    return made
zowrap.ops.loops.compile_function = counted
loss = zm.step(x=torch.ones(4, 6)).loss
report = zm.inspect()
print(json.dumps({"regions": report.compile_count, "cached": report.cached, "kernels": kept, "loss": loss.item(),
                  "trace": report.trace_seconds}))
"""


def run(folder: Path, **environment: str) -> dict:
    env = {**os.environ, "ZOWRAP_CACHE_DIR": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", JOB], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_second_start_of_the_same_job_compiles_nothing(tmp_path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert first["cached"] == 0
    assert not any(first["kernels"])
    assert second["cached"] == second["regions"] == first["regions"] > 0
    assert all(second["kernels"])
    assert len(second["kernels"]) == len(first["kernels"]) > 0
    assert second["loss"] == first["loss"]
    assert second["trace"] > 0


@pytest.mark.slow
def test_a_library_that_cannot_be_loaded_is_compiled_again(tmp_path) -> None:
    first = run(tmp_path)
    libraries = list(tmp_path.rglob("*.main.so"))
    for path in libraries:
        path.write_bytes(b"no library")
    again = run(tmp_path)
    assert libraries and again["loss"] == first["loss"]
    assert all(path.read_bytes() != b"no library" for path in libraries)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or None in (shutil.which("gcc"), shutil.which("readelf")), reason="gcc links ELF files"
)
def test_libraries_hold_what_they_need_where_the_compiler_is_named_as_one_of_c(tmp_path) -> None:
    """peft leaves CXX=gcc behind where its BOFT finds no CUDA, and gcc leaves the library of C++ out."""
    run(tmp_path, CXX="gcc")
    libraries = list(tmp_path.rglob("*.main.so"))
    needed = [subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout for path in libraries]
    assert libraries and all("libstdc++" in each for each in needed)


INTERRUPTED = """#!/bin/sh
for word; do [ "$flag" = -o ] && out=$word; flag=$word; done
case "$*" in *.main.cpp*) if [ -e {marker} ]; then rm {marker}; echo half > "$out"; kill -9 $PPID; exit 1; fi;; esac
exec {compiler} "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch takes g++ by this name")
def test_a_start_killed_while_the_compiler_writes_does_no_harm_to_the_next(tmp_path, monkeypatch) -> None:
    marker, script = tmp_path / "marker", tmp_path / "bin" / "g++"
    script.parent.mkdir()
    script.write_text(INTERRUPTED.format(marker=marker, compiler=shutil.which("g++")))
    script.chmod(0o755)
    marker.touch()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run(tmp_path / "cache")
    assert killed.value.returncode == -signal.SIGKILL
    assert run(tmp_path / "cache")["loss"] > 0


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in (cache.OURS, cache.TORCHS):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path


def test_the_folder_is_the_users_cache_unless_one_is_named(clean, monkeypatch) -> None:
    assert cache.cache_folder() == clean / "home" / "zowrap"
    monkeypatch.setenv(cache.TORCHS, "/torchs")
    assert cache.cache_folder() == Path("/torchs")
    monkeypatch.setenv(cache.OURS, str(clean / "named"))
    assert cache.cache_folder() == clean / "named"
    cache.use_cache_folder()
    assert os.environ[cache.TORCHS] == str(clean / "named")


def test_a_folder_that_cannot_be_made_leaves_torchs_own(clean, monkeypatch) -> None:
    (clean / "file").write_text("")
    monkeypatch.setenv(cache.OURS, str(clean / "file" / "below"))
    cache.use_cache_folder()
    assert cache.TORCHS not in os.environ
