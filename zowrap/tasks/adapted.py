"""Load the model of a folder of adapters: the base that they were tuned on, with the adapters attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zowrap.errors import ZOError
from zowrap.storage.base_options import read_base_options, read_run_config
from zowrap.storage.safetensors import ADAPTER, StrPath, adapters_base


def load_adapted(folder: StrPath) -> Any:
    """Load the ``transformers`` model of a folder of adapters, with its base as it was during tuning.

    Raises:
        ZOError: there are no adapters, or their base cannot be loaded.
    """
    import transformers

    from zowrap.numerics.dtypes import DTYPES as NAMES
    from zowrap.step.pretrained import saved_part
    from zowrap.tasks.loading import Source, load_model, open_source
    from zowrap.tasks.resolve import restore_task

    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise ZOError(f"{folder} holds no adapters to merge: it has no {ADAPTER}")
    facts, run = read_base_options(folder), read_run_config(folder)
    dtype = NAMES.get(facts.get("dtype") or "", torch.float32)
    if run.get("task"):
        source = open_source(str(folder))
        source.complete = True
        source.quantization = facts.get("quantization")
        model: Any = saved_part(restore_task(run["task"]).build(source, dtype))[0]
        return _drop_renaming(model)
    config = transformers.AutoConfig.from_pretrained(adapters_base(folder) or folder)
    name = facts.get("architecture") or (config.architectures or [""])[0]
    kind: Any = getattr(transformers, name, transformers.AutoModel)
    source = Source(str(folder), config, None, quantization=facts.get("quantization"), complete=True)
    changes = {"num_labels": facts["num_labels"]} if "num_labels" in facts else {}
    return _drop_renaming(load_model(source, kind, dtype, **changes))


def _drop_renaming(model: Any) -> Any:
    """Drop the renaming that loading the adapters used: transformers would apply it to the whole model on saving."""
    model.__dict__.pop("_weight_conversions", None)
    return model
