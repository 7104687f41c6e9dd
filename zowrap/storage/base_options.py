"""Record how the base of a folder of adapters was loaded, and load it the same way.

peft's configuration does not say so; zowrap stores it in the header of the adapters' weights, as ``base_options``.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zowrap.quant import schemes
from zowrap.step.parameters import canonical_name
from zowrap.storage.atomic import read_json
from zowrap.storage.safetensors import StrPath, adapter_file, read_metadata, read_shapes


def describe_base(model: nn.Module) -> dict[str, str]:
    """Describe the base of ``model``'s adapters, its class and how it was loaded, for the header of their file."""
    config: Any = getattr(model, "config", None)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    facts: dict[str, Any] = {"architecture": type(inner).__name__}
    if getattr(config, "num_labels", None):
        facts["num_labels"] = config.num_labels
    if isinstance(getattr(inner, "dtype", None), torch.dtype):
        facts["dtype"] = str(inner.dtype).removeprefix("torch.")
    settings = schemes.quantization_settings(config)
    if settings.get("quant_method") == "bitsandbytes":  # other schemes are quantised on disk already
        facts["quantization"] = settings
    return {"base_options": json.dumps(facts, default=str)}


def read_base_options(folder: StrPath) -> dict[str, Any]:
    """Read what :func:`describe_base` wrote into a folder of adapters; without that, use the options of its run.

    The number of classes is that of the head that is saved with the adapters, if there is one.

    Returns:
        ``"dtype"``, ``"num_labels"``, ``"architecture"`` and ``"quantization"`` (arguments of
        ``BitsAndBytesConfig``), each as far as it is known.
    """
    from zowrap.quant.schemes import bitsandbytes_options

    facts = json.loads(read_metadata(adapter_file(folder)).get("base_options", "{}"))
    options = read_run_config(folder).get("options") or {}
    if not facts:
        facts = {"dtype": options.get("dtype"), "quantization": bitsandbytes_options(options)}
    facts = {**facts, "num_labels": _count_classes(folder) or facts.get("num_labels")}
    if facts.get("quantization"):
        from transformers import BitsAndBytesConfig

        known = inspect.signature(BitsAndBytesConfig.__init__).parameters
        facts["quantization"] = {name: value for name, value in facts["quantization"].items() if name in known}
    return facts


# The last matrix of a classification head in the families of transformers: one row for each class.
_LAST_OF_HEAD = ("score", "classifier", "logits_proj", "classifier.out_proj", "classification_head.out_proj")


def _count_classes(folder: StrPath) -> int | None:
    """The number of classes of a head that is saved with the adapters of a folder; None without one."""
    rows = {canonical_name(name): shape[0] for name, shape in read_shapes(adapter_file(folder)).items() if shape}
    return next((rows[f"{name}.weight"] for name in _LAST_OF_HEAD if f"{name}.weight" in rows), None)


def load_options(folder: StrPath) -> dict[str, Any]:
    """The arguments with which ``from_pretrained`` loads a folder of adapters on the same base as in tuning.

    ``AutoModelForSequenceClassification.from_pretrained(RUN, **load_options(RUN))``

    Returns:
        ``dtype``, ``num_labels`` and ``quantization_config``, as far as they are known; empty for a folder with a
        full model, whose own configuration holds them.
    """
    if not adapter_file(folder).is_file():
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


def read_run_config(folder: StrPath) -> dict[str, Any]:
    """Read ``zowrap.json`` of a RUN; empty for any other folder."""
    file = Path(folder) / "zowrap.json"
    return read_json(file) if file.is_file() else {}
