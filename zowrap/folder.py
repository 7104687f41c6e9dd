"""The folder of a run as far as it can be read without torch: what run it is, and how far it came."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zowrap.errors import ZOError
from zowrap.files import read_json


class RunFolder:
    """See :class:`zowrap.run.Run`, which also writes.

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
        """How far the run came: ``state`` (``running``, ``interrupted`` or ``finished``), ``step``, ``max_steps`` …"""
        return dict(read_json(self.config_file).get("status") or {}) if self.config_file.is_file() else {}
