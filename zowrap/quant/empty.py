"""Build a quantised model without its weights: lowered layers on the ``meta`` device, of the size that loading gives.

The library replaces the linear layers of the empty model, as it does before it loads weights. The quantised tensors
of each layer then follow from its shape:

    8-bit   codes int8 [outputs, inputs]; float32 scales [outputs]
    4-bit   two codes per byte and the largest magnitude of each block: 8-bit with its own statistics under double
            quantisation, bfloat16 in the layout for processors with bfloat16 instructions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, need_package
from zowrap.quant.layers import Nf4Linear
from zowrap.quant.lowering import lower
from zowrap.quant.schemes import check_scheme

_NESTED_BLOCK = 256  # the number of block statistics that are quantised together


def quantize_empty(model: nn.Module, asked: Mapping[str, Any] | None) -> nn.Module:
    """Quantise and lower an empty ``model`` by its own configuration, or else by ``asked``.

    Args:
        asked: arguments of ``BitsAndBytesConfig``; None keeps the checkpoint as it is.

    Raises:
        ZOError: the scheme cannot be tuned, or its configuration does not determine the shapes.
    """
    config: Any = model.config
    said = getattr(config, "quantization_config", None)
    if said is None and asked is None:
        return model
    check_scheme(model)
    settings = _settings(said if said is not None else asked)
    _replace_layers(model, settings, stored=said is not None)
    check_scheme(model)
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear8bitLt":
            _empty_8bit(module)
        elif kind == "Linear4bit":
            _empty_4bit(module)
    for layer in lower(model).values():
        if isinstance(layer, Nf4Linear) and _would_repack(layer):
            _repack(layer)
    return model


def _settings(given: Any) -> Any:
    from transformers import BitsAndBytesConfig

    values = dict(given) if isinstance(given, Mapping) else given.to_dict()
    if values.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise ZOError(
            f"a {values['quant_method']} model cannot be inspected without its weights, because its configuration does "
            "not determine their shapes; it can be tuned"
        )
    return BitsAndBytesConfig.from_dict(values)


def _replace_layers(model: Any, settings: Any, stored: bool) -> None:
    """Let bitsandbytes replace the linear layers, on the ``meta`` device.

    Raises:
        ZOError: bitsandbytes is not installed.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    need_package("bitsandbytes")
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=stored)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _empty_8bit(layer: Any) -> None:
    from bitsandbytes.nn import Int8Params

    codes = _empty(layer.out_features, layer.in_features, dtype=torch.int8)
    layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    layer.state.CB, layer.state.SCB = layer.weight.data, _empty(layer.out_features)


def _empty_4bit(layer: Any) -> None:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    made, count = layer.weight, layer.out_features * layer.in_features
    blocks = -(-count // made.blocksize)
    state = QuantState(
        absmax=_empty(blocks, dtype=torch.uint8 if made.compress_statistics else torch.float32),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=_empty(16),
        blocksize=made.blocksize,
        quant_type=made.quant_type,
        dtype=torch.float32,
    )
    if made.compress_statistics:
        nested = QuantState(_empty(-(-blocks // _NESTED_BLOCK)), code=_empty(256), blocksize=_NESTED_BLOCK)
        state.offset, state.state2, state.nested = _empty(), nested, True
    layer.weight = Params4bit(
        _empty(-(-count // 2), 1, dtype=torch.uint8),
        quant_state=state,
        blocksize=made.blocksize,
        compress_statistics=made.compress_statistics,
        quant_type=made.quant_type,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def _would_repack(layer: Nf4Linear) -> bool:
    """Whether bitsandbytes would repack the codes of such a layer for this machine's processor."""
    rows, columns = layer.shape
    fits = rows % 32 == 0 and columns % layer.blocksize == 0
    return not torch.cuda.is_available() and bool(layer.original.support_avx512bf16_for_cpu) and fits


def _repack(layer: Nf4Linear) -> None:
    rows, columns = layer.shape
    layer.weight = nn.Parameter(_empty(rows, columns // 2, dtype=torch.uint8), requires_grad=False)
    layer.absmax = _empty(columns // layer.blocksize, rows, dtype=torch.bfloat16)
    for name in ("absmax_scale", "absmax_code", "absmax_offset"):
        setattr(layer, name, None)
    layer.packed = True
