"""Quantised checkpoints as plain 16- or 32-bit ones, from their files.

Serving engines and converters to other formats take 16-bit weights; few take the scales of an 8-bit checkpoint. The
dequantised weights are those that the 8-bit model multiplies by, but its activations are no longer rounded:
:func:`zowrap.storage.compare.output_error` says what that comes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zowrap.errors import ZOError
from zowrap.numerics import codes
from zowrap.quant import lowering
from zowrap.storage.atomic import read_json, write_json
from zowrap.storage.formats import DTYPES
from zowrap.storage.safetensors import WEIGHTS, Path_, opened, read_metadata, weight_files, write_tensors


def is_quantized_folder(folder: Path_) -> bool:
    """Whether a model folder's configuration says that its weights are quantised."""
    config = Path(folder) / "config.json"
    return config.is_file() and bool(read_json(config).get("quantization_config"))


def dequantized(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that the tensors of a bitsandbytes checkpoint stand for, in ``dtype``.

    Raises:
        ZOError: integer weights without the scales that belong to them.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        if tensor.dtype == torch.int8 and name.endswith("weight"):
            if f"{stem}SCB" not in tensors:
                raise ZOError(f"{name} holds 8-bit codes without their scales ({stem}SCB)")
            result[name] = codes.dequantize(tensor, codes.unit_of(tensors[f"{stem}SCB"])).to(dtype)
        elif tensor.dtype == torch.uint8 and name.endswith("weight"):
            result[name] = _four_bit(name, tensors).to(dtype)
        elif tensor.is_floating_point() and not name.endswith((".SCB", ".absmax", ".quant_map", ".nested_absmax",
                                                               ".nested_quant_map")):  # fmt: skip
            result[name] = tensor.to(dtype)
        elif not _belongs_to_a_weight(name):
            result[name] = tensor
    return result


def _belongs_to_a_weight(name: str) -> bool:
    ends = (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return name.endswith(ends) or ".quant_state." in name


def _four_bit(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if not any("quant_state" in key for key in parts):
        raise ZOError(f"{name} holds 4-bit codes without the state that says how to read them")
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    return dequantize_4bit(tensors[name], state)


def write_dequantized(folder: Path_, to: Path, name: str, max_shard_size: int | str) -> None:
    """Write the weights and the configuration of a quantised model folder in ``"bf16"`` or ``"fp32"``.

    Raises:
        ZOError: a scheme whose files cannot be read here.
    """
    folder, dtype = Path(folder), DTYPES[name]
    settings = read_json(folder / "config.json")
    method = str(settings.get("quantization_config", {}).get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        raise ZOError(
            f"{folder} is quantised by {method}: only bitsandbytes checkpoints are dequantised from their files"
        )
    tensors: dict[str, Tensor] = {}
    files = weight_files(folder)
    for file in files:
        with opened(file) as stored:
            tensors.update({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118 (not a dict)
    facts = {"format": "pt", **read_metadata(files[0])}
    plain, turned = dequantized(tensors, dtype), _turned_weights(folder)
    for key in turned & plain.keys():
        if tensors[key].dtype in (torch.int8, torch.uint8):
            plain[key] = plain[key].t().contiguous()
    write_tensors(plain, to, WEIGHTS, max_shard_size, facts)
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key, None)
    write_json(to / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})


def _turned_weights(folder: Path_) -> set[str]:
    """Names of the weights that a model holds the other way round than its quantised layers do (GPT-2's family)."""
    kind, config = _class_of(folder)
    if kind is None:
        return set()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = kind._from_config(config)
    return {f"{name}.weight" for name, module in model.named_modules() if lowering.is_transposed(type(module))}


def _class_of(folder: Path_) -> tuple[Any, Any]:
    """The ``transformers`` class that a model folder names, None where there is none, and its configuration."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, (config.architectures or [""])[0], None), config
