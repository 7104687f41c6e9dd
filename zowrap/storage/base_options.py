"""How the base of a folder of adapters was loaded.

A folder of adapters does not say so itself. The header of its weights does, as ``base_options``.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zowrap.quant import schemes
from zowrap.storage.atomic import read_json
from zowrap.storage.safetensors import ADAPTER, Path_, read_metadata


def base_options(model: nn.Module) -> dict[str, str]:
    """For the header of a file of adapters: of what class their base is, and how it was loaded."""
    config: Any = getattr(model, "config", None)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    facts: dict[str, Any] = {"architecture": type(inner).__name__}
    if getattr(config, "num_labels", None):
        facts["num_labels"] = config.num_labels
    if isinstance(getattr(inner, "dtype", None), torch.dtype):
        facts["dtype"] = str(inner.dtype).removeprefix("torch.")
    settings = schemes.quantization_settings(config)
    if settings.get("quant_method") == "bitsandbytes":  # others are quantised on the disk already
        facts["quantization"] = settings
    return {"base_options": json.dumps(facts, default=str)}


def read_base_options(folder: Path_) -> dict[str, Any]:
    """What :func:`base_options` wrote into a folder of adapters; of one that does not say, what its run's options say.

    ``"quantization"``, where there is one, holds arguments of ``BitsAndBytesConfig``.
    """
    from zowrap.quant.schemes import bitsandbytes_options

    facts = json.loads(read_metadata(Path(folder) / ADAPTER).get("base_options", "{}"))
    options = _run_of(folder).get("options") or {}
    if not facts:
        facts = {"dtype": options.get("dtype"), "quantization": bitsandbytes_options(options)}
    if facts.get("quantization"):
        from transformers import BitsAndBytesConfig

        known = inspect.signature(BitsAndBytesConfig.__init__).parameters
        facts["quantization"] = {name: value for name, value in facts["quantization"].items() if name in known}
    return facts


def load_options(folder: Path_) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` loads a folder of adapters as they were tuned: how their base is loaded.

    ``AutoModelForSequenceClassification.from_pretrained(RUN, **load_options(RUN))``

    Returns:
        ``dtype``, ``num_labels`` and ``quantization_config``, as far as they are known; nothing for a folder with a
        whole model, whose configuration says all that.
    """
    if not (Path(folder) / ADAPTER).is_file():
        return {}
    facts = read_base_options(folder)
    options: dict[str, Any] = {}
    if facts.get("dtype"):
        options["dtype"] = getattr(torch, facts["dtype"])
    if facts.get("num_labels"):
        options["num_labels"] = facts["num_labels"]
    if facts.get("quantization"):
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**facts["quantization"])
    return options


def _run_of(folder: Path_) -> dict[str, Any]:
    """``zowrap.json`` of a RUN; empty for any other folder."""
    file = Path(folder) / "zowrap.json"
    return read_json(file) if file.is_file() else {}
