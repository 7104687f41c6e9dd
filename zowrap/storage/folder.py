"""Read a run's configuration and status from its folder, without importing torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.storage.atomic import TMP, read_json
from zowrap.storage.lock import list_entries

# The files that a killed process can leave half-written; a user's own notes.tmp is not one of them.
LEFTOVER = re.compile(
    r"^(zowrap\.json|journal\.jsonl|before\.json|model|checkpoint-\d+)" + re.escape(TMP) + r"$|^loss\.tmp\.png$"
)


class RunFolder:
    """A run's folder, read-only; :class:`zowrap.training.run_folder.Run` also writes.

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
        """Read the resolved configuration.

        Raises:
            ZOError: the folder is not a RUN.
        """
        if not self.config_file.is_file():
            raise ZOError(f"{self.path} is not a run: there is no {self.config_file.name} in it")
        return read_json(self.config_file)

    def status(self) -> dict[str, Any]:
        """Read the run's progress: ``state``, ``step``, ``max_steps`` …

        The state is ``running``, ``interrupted``, ``finished`` or ``failed``, the last with a ``reason``.
        """
        return dict(read_json(self.config_file).get("status") or {}) if self.config_file.is_file() else {}

    def failure(self) -> str | None:
        """The reason why the run failed, as a clause with the step; None if it did not fail."""
        status = self.status()
        return str(status.get("reason")) if status.get("state") == "failed" else None

    def has_content(self) -> bool:
        """Whether the folder holds more than the leftovers of a run that was killed right at its start."""
        return not all(LEFTOVER.match(entry.name) for entry in list_entries(self.path))
