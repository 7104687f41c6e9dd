"""How far the outputs of an exported model are from those of the one it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zowrap.errors import ZOError, first_line
from zowrap.quant import lowering
from zowrap.storage.dequantize import _class_of
from zowrap.storage.formats import DTYPES
from zowrap.storage.safetensors import ADAPTER, Load, Path_, check_adapter_settings

PROBE_ROWS, PROBE_LENGTH = 8, 32  # of random token ids


def output_error(folder: Path_, plain: Path_, name: str, load: Load | None = None) -> tuple[float | None, str | None]:
    """How far a plain copy's outputs are from those of the quantised model, or of its adapters, that it was made of.

    Outputs are logits, or the last hidden state of a model without a head, on rows of token ids that are always the
    same.

    Args:
        folder: the quantised model, ``plain`` its copy in ``"bf16"`` or ``"fp32"``.
        load: loads the model of a folder of adapters: :func:`zowrap.tasks.adapted.adapted`.

    Returns:
        The root mean square of the difference over the standard deviation of the quantised model's outputs, and None.
        Or None and the reason, for a model that ``transformers`` has no class for or that takes other inputs.

    Raises:
        ZOError: the copy is not the whole model, as ``transformers`` reads it.
    """
    kind, config = _class_of(plain)
    if kind is None:
        return None, f"transformers has no class {(config.architectures or ['for it'])[0]}"
    copied, report = kind.from_pretrained(plain, use_safetensors=True, dtype=DTYPES[name], output_loading_info=True)
    wrong = [*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))]
    if wrong:
        raise ZOError(f"{plain} was written, and is not the whole model: {wrong[0]} is missing or of another shape")
    if (Path(folder) / ADAPTER).is_file():
        if load is None:
            raise TypeError("the model of adapters is loaded by load=zowrap.tasks.adapted.adapted")
        model = load(folder)
    else:
        check_adapter_settings(folder)
        model = kind.from_pretrained(folder, use_safetensors=True).eval()
    lowering.lower(model)  # the same outputs; on some processors the library's own layers take fewer shapes
    try:
        wanted, found = _outputs(model), _outputs(copied.eval())
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        # A model raises what it likes for inputs that are not its own.
        return None, f"it does not take token ids alone ({first_line(error)})"
    return float((found - wanted).square().mean().sqrt() / wanted.std()), None


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """float32 ``[rows, ...]``; one row at a time, for some heads take more only with a padding token."""
    config = model.config
    text = config.get_text_config()
    length = min(PROBE_LENGTH, getattr(text, "max_position_embeddings", None) or PROBE_LENGTH)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (PROBE_ROWS, length), generator=draw).to(model.device)
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    given = [model(**dict.fromkeys(names, row)) for row in ids.split(1)]
    return torch.cat([out["logits" if "logits" in out else "last_hidden_state"] for out in given]).float()
