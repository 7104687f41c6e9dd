"""Compare the outputs of an exported model with those of the model it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zowrap.errors import ZOError, first_line
from zowrap.quant import lowering
from zowrap.storage.dequantize import find_model_class
from zowrap.storage.formats import DTYPES
from zowrap.storage.safetensors import Load, StrPath, adapter_file, check_adapter_settings

PROBE_ROWS, PROBE_LENGTH = 8, 32  # of random token ids


def measure_output_error(
    folder: StrPath, plain: StrPath, name: str, load: Load | None = None
) -> tuple[float | None, str | None]:
    """Measure how far the outputs of a plain copy are from those of the quantised or adapted model.

    Outputs are the logits, or the last hidden state of a model without a head, for a fixed set of random token ids.

    Args:
        folder: the quantised model, or the adapters.
        plain: its copy in the format ``name``, ``"bf16"`` or ``"fp32"``.
        load: loads the model of a folder of adapters: :func:`zowrap.tasks.adapted.load_adapted`.

    Returns:
        (error, None), with the root mean square of the difference divided by the standard deviation of the original's
        outputs; or (None, reason) for a model that ``transformers`` has no class for, or that needs other inputs.

    Raises:
        ZOError: ``transformers`` finds weights missing in the copy.
    """
    kind, config = find_model_class(plain)
    if kind is None:
        return None, f"transformers has no class {(config.architectures or ['for it'])[0]}"
    copied, report = kind.from_pretrained(plain, use_safetensors=True, dtype=DTYPES[name], output_loading_info=True)
    wrong = [*report["missing_keys"], *map(str, report.get("mismatched_keys", ()))]
    if wrong:
        raise ZOError(f"{plain} was written but is incomplete: {wrong[0]} is missing or has another shape")
    if adapter_file(folder).is_file():
        if load is None:
            raise TypeError("adapters need load=zowrap.tasks.adapted.load_adapted")
        model = load(folder)
    else:
        check_adapter_settings(folder)
        model = kind.from_pretrained(folder, use_safetensors=True).eval()
    # The outputs are the same, but on some processors the library's layers accept fewer shapes.
    lowering.lower(model, forward_only=True)
    try:
        wanted, found = _outputs(model), _outputs(copied.eval())
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        # A model may raise anything for inputs that it does not expect.
        return None, f"it needs more inputs than token ids ({first_line(error)})"
    return float((found - wanted).square().mean().sqrt() / wanted.std()), None


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """float32 ``[rows, ...]``, computed row by row, because some heads need a padding token for more than one."""
    config = model.config
    text = config.get_text_config()
    length = min(PROBE_LENGTH, getattr(text, "max_position_embeddings", None) or PROBE_LENGTH)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (PROBE_ROWS, length), generator=draw).to(model.device)
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    given = [model(**dict.fromkeys(names, row)) for row in ids.split(1)]
    return torch.cat([out["logits" if "logits" in out else "last_hidden_state"] for out in given]).float()
