"""One process at a time trains into a folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_run import trainer_in
from zowrap.errors import ZOError
from zowrap.storage.lock import LOCK, check_one_process, list_entries, lock_folder

HOLDS = """
import sys, time
from zowrap.storage.lock import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def start_owner(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder's lock."""
    owner = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    return owner


def test_a_second_process_is_refused_until_the_owner_dies_however_it_dies(tmp_path: Path) -> None:
    owner = start_owner(tmp_path / "run")
    (tmp_path / "other_name").symlink_to(tmp_path / "run", target_is_directory=True)
    for name in ("run", "other_name"):
        with (
            pytest.raises(ZOError, match=f"another process trains in .*{owner.pid} on {socket.gethostname()}"),
            lock_folder(tmp_path / name),
        ):
            pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "run" / LOCK).exists()  # what a kill leaves behind locks nothing
    with lock_folder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_same_process_may_lock_again(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with lock_folder(tmp_path):
            assert not list_entries(tmp_path)
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_made_for_the_lock_goes_if_nothing_is_put_there(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [entry.name for entry in list_entries(tmp_path / "a" / "b")] == ["kept"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path: Path) -> None:
    script = HOLDS.replace(
        "    time.sleep(60)",
        "    import os\n    child = os.fork()\n    time.sleep(60) if child == 0 else print(child, flush=True)\n"
        "    if child: os._exit(0)",
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    child = int(owner.stdout.readline())
    try:
        owner.wait(timeout=30)
        until = time.monotonic() + 10  # the child forgets the lock right after the fork, maybe after the parent's end
        while True:
            try:
                with lock_folder(tmp_path):
                    break
            except ZOError:
                assert time.monotonic() < until, "the child holds the lock"
                time.sleep(0.05)
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_trainer_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path: Path) -> None:
    trainer_in(tmp_path / "run", max_steps=2).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    owner = start_owner(tmp_path / "run")
    try:
        for options in ({"resume": True}, {"overwrite": True}):
            resume = options.pop("resume", None)
            with pytest.raises(ZOError, match="another process trains in"):
                trainer_in(tmp_path / "run", max_steps=2, **options).train(resume_from_checkpoint=resume)
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != LOCK}
        assert before == {path: after[path] for path in before}
    finally:
        owner.kill()
        owner.wait()
    assert trainer_in(tmp_path / "run", max_steps=2).train(resume_from_checkpoint=True).global_step == 2


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_refused_before_anything_is_written(
    name: str, monkeypatch: pytest.MonkeyPatch, zowrap_cli, models, data, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, "1")
    check_one_process()
    monkeypatch.setenv(name, "2")
    with pytest.raises(ZOError, match=f"several processes .* {name} is 2: start a single one"):
        trainer_in(tmp_path / "trainer")
    told = zowrap_cli("tune", models["encoder"], "--data", data["train"], "--steps", 1, "--out", tmp_path / "run")
    assert told.code == 2 and "several processes" in told.err
    assert not list(tmp_path.iterdir())
