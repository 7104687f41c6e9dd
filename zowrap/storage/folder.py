"""The folder of a run as far as it can be read without torch: what run it is, and how far it came."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.storage.atomic import TMP, read_json
from zowrap.storage.lock import entries

# What a kill can leave of files that were being written; a user's own notes.tmp is none of them.
LEFTOVER = re.compile(
    r"^(zowrap\.json|journal\.jsonl|before\.json|model|checkpoint-\d+)" + re.escape(TMP) + r"$|^loss\.tmp\.png$"
)


class RunFolder:
    """See :class:`zowrap.training.run_folder.Run`, which also writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "zowrap.json"

    @property
    def journal_file(self) -> Path:
        return self.path / "journal.jsonl"

    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            ZOError: this folder is not a RUN.
        """
        if not self.config_file.is_file():
            raise ZOError(f"{self.path} is not a run: there is no {self.config_file.name} in it")
        return read_json(self.config_file)

    def status(self) -> dict[str, Any]:
        """How far the run came: ``state``, ``step``, ``max_steps`` …

        The state is ``running``, ``interrupted``, ``finished`` or ``failed``, the last with a ``reason``.
        """
        return dict(read_json(self.config_file).get("status") or {}) if self.config_file.is_file() else {}

    def failure(self) -> str | None:
        """Why the run failed, as a clause with the step; None where it did not."""
        status = self.status()
        return str(status.get("reason")) if status.get("state") == "failed" else None

    def holds_something(self) -> bool:
        """Whether the folder holds more than a start that was killed in its first calls leaves behind."""
        return not all(LEFTOVER.match(entry.name) for entry in entries(self.path))
