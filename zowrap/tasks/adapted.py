"""The model of a folder of adapters: its base as it was tuned, with the adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zowrap.errors import ZOError
from zowrap.storage.base_options import _run_of, read_base_options
from zowrap.storage.safetensors import ADAPTER, Path_, adapters_base


def adapted(folder: Path_) -> Any:
    """The ``transformers`` model of a folder of adapters: the base as it was tuned, with the adapters on it.

    Raises:
        ZOError: there are no adapters, or their base cannot be loaded.
    """
    import transformers

    from zowrap.numerics.dtypes import DTYPES as NAMES
    from zowrap.step.pretrained import saved_part
    from zowrap.tasks.loading import Source, load, open_source
    from zowrap.tasks.resolve import from_record

    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise ZOError(f"{folder} holds no adapters to merge: there is no {ADAPTER} in it")
    facts, run = read_base_options(folder), _run_of(folder)
    dtype = NAMES.get(facts.get("dtype") or "", torch.float32)
    if run.get("task"):
        source = open_source(str(folder))
        source.quantization = facts.get("quantization")
        model: Any = saved_part(from_record(run["task"]).build(source, dtype))[0]
        return _named_as_itself(model)
    config = transformers.AutoConfig.from_pretrained(adapters_base(folder) or folder)
    name = facts.get("architecture") or (config.architectures or [""])[0]
    kind: Any = getattr(transformers, name, transformers.AutoModel)
    source = Source(str(folder), config, None, quantization=facts.get("quantization"))
    changes = {"num_labels": facts["num_labels"]} if "num_labels" in facts else {}
    return _named_as_itself(load(source, kind, dtype, **changes))


def _named_as_itself(model: Any) -> Any:
    """Without the renaming by which the adapters were read: transformers would write the whole model under it."""
    model.__dict__.pop("_weight_conversions", None)
    return model
