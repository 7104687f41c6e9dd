"""Lock a run's folder, so that only one process at a time trains into it.

The lock is an advisory ``flock`` on a small file in the folder, which the system releases when its owner dies. The file
names the owner, for the error that a second process gets. Reading the folder needs no lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from zowrap.errors import ZOError, ZOWarning

try:
    import fcntl
except ImportError:  # Windows: no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

LOCK = ".zowrap.lock"
# The variables that launchers set for each of their processes, as accelerate looks for them.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# The errors of a file system without locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def check_one_process() -> None:
    """Check that no launcher started several processes: each would train the whole run into the same folder.

    Raises:
        ZOError: ``torchrun``, ``accelerate launch`` or MPI started more than one process.
    """
    for name in _WORLD_SIZES:
        size = os.environ.get(name, "")
        if size.strip().isdigit() and int(size) > 1:
            raise ZOError(
                f"several processes (torchrun, accelerate launch) are not supported, and {name} is {size}: start a "
                "single one"
            )


@dataclass
class _Held:
    """A lock that this process holds.

    Attributes:
        descriptor: of the open lock file; closing it releases the lock. None if the file system has no locks.
        made: folders that were created for the lock, innermost first.
        count: the number of nested :func:`lock_folder` contexts.
    """

    descriptor: int | None
    made: list[Path] = field(default_factory=list)
    count: int = 1


_held: dict[tuple[int, int], _Held] = {}


def _forget() -> None:
    """Drop all locks in a child of ``fork``: they are the parent's, and the child must not keep them alive."""
    for held in _held.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def lock_folder(folder: str | os.PathLike[str], made: bool = False) -> Iterator[None]:
    """Hold the lock of a folder while inside, creating the folder if needed. The lock is reentrant within a process.

    A folder that was created for this and is still empty at the end is removed.

    Args:
        made: the caller has just created the folder for the work under this lock.

    Raises:
        ZOError: another process holds the lock, or the folder cannot be created.
    """
    path = Path(folder)
    while True:
        created = _make_folder(path) or ([path] if made else [])
        try:
            facts = os.stat(path)
            break
        except FileNotFoundError:  # the process that created it has just removed it
            continue
    key = (facts.st_dev, facts.st_ino)
    if key in _held:
        _held[key].count += 1
    else:
        try:
            _held[key] = _Held(_acquire(path), created)
        except BaseException:
            _remove_empty(created)
            raise
    held = _held[key]
    try:
        yield
    finally:
        held.count -= 1
        if not held.count and _held.pop(key, None) is not None:  # a forked child has dropped it already
            _release(path, held)


def list_entries(folder: Path) -> list[Path]:
    """List the entries of a folder except its lock, sorted; empty if there is no folder."""
    return sorted(entry for entry in folder.iterdir() if entry.name != LOCK) if folder.is_dir() else []


def _make_folder(path: Path) -> list[Path]:
    """Create a folder and its parents. Returns those that were created, innermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZOError(f"{path} cannot be created: {os.strerror(error.errno or 0).lower()}") from error
    return missing


def _acquire(path: Path) -> int | None:
    if fcntl is None:
        return None
    file = path / LOCK
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the process that created the folder has just removed it
            path.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            raise ZOError(f"{path} cannot be written: {os.strerror(error.errno or 0).lower()}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                warnings.warn(
                    f"{path} is on a file system without locks: make sure that only one process trains there",
                    ZOWarning,
                    stacklevel=5,
                )
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise ZOError(f"{path} cannot be locked: {os.strerror(error.errno or 0).lower()}") from error
            raise ZOError(
                f"another process trains in {path} ({owner}): wait until it ends, or use another folder"
            ) from None
        # The last owner may have removed the file after we opened it: then this lock is on a deleted file.
        if _is_same_file(file, descriptor):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return descriptor


def _is_same_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    """``process 4711 on host``, as the owner wrote it, which it may not have done yet."""
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        pid, host = int(facts["pid"]), str(facts["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown which"
    return f"process {pid} on {host if host.isprintable() else repr(host)}"


def _release(path: Path, held: _Held) -> None:
    if held.descriptor is not None:
        (path / LOCK).unlink(missing_ok=True)
        os.close(held.descriptor)
    _remove_empty(held.made)


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # it is no longer empty, or is gone
            return
