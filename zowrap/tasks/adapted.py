"""Load the model of a folder of adapters: the base that they were tuned on, with the adapters attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zowrap.errors import ZOError
from zowrap.storage.atomic import read_json
from zowrap.storage.base_options import read_base_options, read_run_config
from zowrap.storage.safetensors import (
    ADAPTER,
    ADAPTER_CONFIG,
    StrPath,
    adapter_file,
    adapters_base,
    adapters_folder,
)

# The classes of the bases of adapters that only their task is known of, by peft's names of the tasks.
_BASES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapted(folder: StrPath) -> Any:
    """Load peft's model of a folder of adapters, with its base as it was during tuning.

    Raises:
        ZOError: there are no adapters, or their base cannot be loaded.
    """
    import transformers

    from zowrap.numerics.dtypes import DTYPES as NAMES
    from zowrap.step.pretrained import saved_part
    from zowrap.tasks.heads import identify
    from zowrap.tasks.loading import Source, load_model, open_source
    from zowrap.tasks.resolve import restore_task

    folder = Path(folder)
    if not adapter_file(folder).is_file():
        raise ZOError(f"{folder} holds no adapters to merge: it has no {ADAPTER}")
    facts, run = read_base_options(folder), read_run_config(folder)
    dtype = NAMES.get(facts.get("dtype") or "", torch.float32)
    if run.get("task"):
        source = open_source(str(folder))
        source.complete = True
        source.quantization = facts.get("quantization")
        return saved_part(restore_task(run["task"]).build(source, dtype))[0]
    config = transformers.AutoConfig.from_pretrained(adapters_base(folder) or folder)
    task = read_json(adapters_folder(folder) / ADAPTER_CONFIG).get("task_type")
    source = Source(str(folder), config, None, quantization=facts.get("quantization"), complete=True)
    kind = "SEQ_CLS" if task is None and identify(source).kind == "sequence" else task
    name = facts.get("architecture") or _BASES.get(kind) or (config.architectures or [""])[0]
    auto: Any = getattr(transformers, name, transformers.AutoModel)
    labels = facts.get("num_labels")
    # The head of the base, which may be of other classes, makes way for the one beside the adapters.
    changes = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    return load_model(source, auto, dtype, **changes)
