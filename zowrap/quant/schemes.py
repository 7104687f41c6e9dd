"""Check which quantisation schemes are supported, and read the settings of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zowrap.errors import Option, ZOError
from zowrap.quant.layers import Lowered, is_int8_weight_only


def bitsandbytes_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of ``BitsAndBytesConfig`` for a command's ``load_in_8bit`` or ``load_in_4bit``; None for neither.

    Threshold 0 rounds all activations: the outlier path is slower, and its columns differ between the two sides of a
    direction. 4-bit weights are nf4 with double quantisation, as QLoRA (2305.14314) recommends.
    """
    if options.get("load_in_8bit"):
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if options.get("load_in_4bit"):
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return None


SUPPORTED = "bitsandbytes 8-bit (load_in_8bit) and 4-bit (load_in_4bit: nf4, fp4), torchao int8 weight-only"
# The names of unsupported schemes, by the package of their layers.
_OTHERS = {
    "optimum.quanto": "Quanto",
    "torch.ao.nn.quantized": "torch.ao's dynamic or static quantisation",
    "torch.ao.nn.intrinsic.quantized": "torch.ao's dynamic or static quantisation",
    "gptqmodel": "GPTQ",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "eetq": "EETQ",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "compressed_tensors": "compressed-tensors",
    "fbgemm": "FBGEMM fp8",
}


def _is_from(module: nn.Module, package: str) -> bool:
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(module).__mro__)


def check_config(config: Any) -> None:
    """Raise :class:`ZOError` if a model's configuration names a scheme that is not supported."""
    name = _configured_scheme(config)
    if name:
        raise _unsupported(name)


def _configured_scheme(config: Any) -> str:
    """The name of the scheme in a configuration; empty for a supported one or none."""
    name = str(quantization_settings(config).get("quant_method") or "")
    if name.lower() in ("", "bitsandbytes", "torchao"):
        return ""
    return name.upper() if len(name) <= 5 else name


def quantization_settings(config: Any) -> dict[str, Any]:
    """The quantisation settings in a model's configuration; empty if it is not quantised."""
    said = getattr(config, "quantization_config", None)
    found = dict(said if isinstance(said, dict) else said.to_dict()) if said else {}
    method = found.get("quant_method")
    return {**found, "quant_method": getattr(method, "value", method)} if found else {}


def check_requested(name: str, config: Any, asked: Mapping[str, Any] | None) -> None:
    """Raise :class:`ZOError` if a checkpoint is already quantised to another width than ``asked``.

    Args:
        name: of the checkpoint.
        asked: arguments of ``BitsAndBytesConfig``; None loads the checkpoint as it is.
    """
    said = quantization_settings(config)
    if asked is None or not said:
        return
    wanted, found = (
        next((bits for bits in ("8bit", "4bit") if each.get(f"load_in_{bits}") or each.get(f"_load_in_{bits}")), None)
        for each in (asked, said)
    )
    if wanted and wanted != found:
        raise ZOError(
            f"{name} is already quantised by {said.get('quant_method')}{f' to {found}' if found else ''}, and cannot "
            f"be loaded in {wanted}: leave out --load-in-{wanted}, or name the unquantised model"
        )


def check_scheme(model: nn.Module, forward_only: bool = False) -> None:
    """Raise :class:`ZOError`, naming the scheme, unless every quantised layer is of a supported kind.

    Args:
        forward_only: nothing quantised is to move, so layers of any kind will do that can compute their outputs.
    """
    found = None if forward_only else find_other_scheme(model)
    if found is not None:
        raise _unsupported(*found)
    for where, module in model.named_modules():
        if _is_from(module, "bitsandbytes") and (module._parameters or module._buffers):
            _check_bitsandbytes(where, module)


def find_other_scheme(model: nn.Module) -> tuple[str, str] | None:
    """Find a scheme that is not supported: its name and a layer's, which is empty if the configuration names it."""
    name = _configured_scheme(getattr(model, "config", None))
    if name:
        return name, ""
    for where, module in model.named_modules():
        scheme = other_scheme_of(module)
        if scheme is not None:
            return scheme, where
    return None


def other_scheme_of(module: nn.Module) -> str | None:
    """The name of the scheme that a layer itself is quantised by, unless it is a supported one or none."""
    if isinstance(module, Lowered):
        return None
    for package, scheme in _OTHERS.items():
        if _is_from(module, package):
            return scheme
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    if tensors and _is_from(module, "bitsandbytes") and "Embedding" in type(module).__name__:
        return f"bitsandbytes {type(module).__name__}"
    for tensor in tensors:
        kind = type(tensor)
        if "float8" in str(tensor.dtype):
            return "fp8"
        if kind.__module__.startswith("torchao") and not is_int8_weight_only(tensor):
            return f"torchao {kind.__name__}"
    return None


def _check_bitsandbytes(where: str, module: Any) -> None:
    kind = type(module).__name__
    if "Embedding" in kind:
        return
    if hasattr(module, "state") and getattr(module.state, "has_fp16_weights", False):
        raise ZOError(
            f"{where} keeps 16-bit weights (llm_int8_has_fp16_weight) and rounds them in each forward: "
            "load the model with ",
            Option("load_in_8bit", True, python="BitsAndBytesConfig(load_in_8bit=True)"),
            " and without that option",
        )
    if not _holds_codes(module):
        raise ZOError(
            f"{where or kind} is a {kind} whose weights are not quantised yet: load the model with from_pretrained, or "
            "move it to its device first, which quantises them"
        )


def _holds_codes(module: Any) -> bool:
    """Whether a layer's weights were loaded or quantised; the library first builds it with plain weights."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.is_meta or weight.dtype == torch.int8:
        return True
    return any(getattr(holder, "quant_state", None) is not None for holder in (weight, module))


def _unsupported(scheme: str, where: str = "") -> ZOError:
    at = f" ({where})" if where else ""
    return ZOError(
        f"this model is quantised by {scheme}{at}, whose weights cannot be tuned: tune adapters on it (",
        Option("use_peft", True, python="quantized='adapters'"),
        f"), load it in one of the supported schemes ({SUPPORTED}) or in 16 bits, or dequantise it first",
    )
