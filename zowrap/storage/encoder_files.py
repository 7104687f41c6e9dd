"""Name the files that make a model folder a sentence encoder of sentence-transformers, and copy them.

modules.json                      what follows the transformer, in order; each with a folder of its own
1_Pooling/config.json
2_Dense/config.json, model.safetensors
sentence_bert_config.json         settings of the transformer: the window, lower case
config_sentence_transformers.json  prompts
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from zowrap.errors import ZOError
from zowrap.storage.atomic import read_json

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
# The settings of the transformer, in the order in which sentence-transformers looks for them.
TRANSFORMER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# The files of one module, in its folder.
MODULE_SETTINGS, MODULE_WEIGHTS, MODULE_PICKLE = "config.json", "model.safetensors", "pytorch_model.bin"


def lists_modules(value: Any) -> bool:
    """Whether a JSON value is a list of sentence-transformers' modules, and not what another tool calls modules."""
    types = [str(each.get("type", "")) for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    return any(name.startswith("sentence_transformers.") for name in types)


def check_modules(value: Any, file: str) -> list[dict[str, Any]]:
    """Check what ``modules.json`` holds: a list of modules, each with a type and a folder inside the model's.

    Raises:
        ZOError: it is damaged, or names a folder outside the model's.
    """
    entries: list[Any] = value if isinstance(value, list) else [None]
    for each in entries:
        if not isinstance(each, dict) or not all(isinstance(each.get(name), str) for name in ("type", "path")):
            raise ZOError(f"{file} is damaged: it is no list of modules, each with a type and a path")
        path = each["path"]
        if PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
            raise ZOError(f"{file} names the folder {path!r}, which is not inside the model's")
    return entries


def module_folders(folder: Path) -> list[str]:
    """The folders of a sentence encoder's modules, as paths within the model's; empty for any other model.

    Raises:
        ZOError: ``modules.json`` is damaged.
    """
    file = folder / MODULES
    value = read_json(file) if file.is_file() else None
    entries = check_modules(value, str(file)) if lists_modules(value) else []
    return [each["path"] for each in entries if each["path"] not in ("", ".") and (folder / each["path"]).is_dir()]


def pickled_modules(folder: Path) -> list[Path]:
    """The weights of a sentence encoder's modules that are pickles, without safetensors beside them."""
    files = (folder / path / MODULE_PICKLE for path in module_folders(folder))
    return [file for file in files if file.is_file() and not file.with_name(MODULE_WEIGHTS).is_file()]


def copy_modules(source: Path, to: Path) -> None:
    """Copy the folders of a sentence encoder's modules, if ``source`` is one: settings and weights, and no code.

    Pickled weights are left out, see :func:`pickled_modules`.
    """
    for path in module_folders(source):
        for name in (MODULE_SETTINGS, MODULE_WEIGHTS):
            if (source / path / name).is_file():
                (to / path).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / path / name, to / path / name)
