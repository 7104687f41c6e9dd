"""Convert the files of a quantised checkpoint to plain 16- or 32-bit weights.

Serving engines and converters to other formats read 16-bit weights; few read the scales of an 8-bit checkpoint. The
dequantised weights are exactly those that the 8-bit model multiplies by, but activations are no longer rounded.
:func:`zowrap.storage.compare.measure_output_error` measures the effect of that.
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
from zowrap.storage.safetensors import WEIGHTS, StrPath, open_safetensors, read_metadata, weight_files, write_tensors


def is_quantized_folder(folder: StrPath) -> bool:
    """Whether the weights in a model folder are quantised, according to its configuration."""
    config = Path(folder) / "config.json"
    return config.is_file() and bool(read_json(config).get("quantization_config"))


def dequantize_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Dequantise the tensors of a bitsandbytes checkpoint to weights of ``dtype``.

    Raises:
        ZOError: the scales or the quantisation state of integer weights are missing.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("weight")
        if tensor.dtype == torch.int8 and name.endswith("weight"):
            if f"{stem}SCB" not in tensors:
                raise ZOError(f"{name} is 8-bit, and its scales ({stem}SCB) are missing from the checkpoint")
            result[name] = codes.dequantize(tensor, codes.unit_of(tensors[f"{stem}SCB"])).to(dtype)
        elif tensor.dtype == torch.uint8 and name.endswith("weight"):
            result[name] = _dequantize_4bit(name, tensors).to(dtype)
        elif tensor.is_floating_point() and not name.endswith((".SCB", ".absmax", ".quant_map", ".nested_absmax",
                                                               ".nested_quant_map")):  # fmt: skip
            result[name] = tensor.to(dtype)
        elif not _is_quantization_data(name):
            result[name] = tensor
    return result


def _is_quantization_data(name: str) -> bool:
    ends = (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return name.endswith(ends) or ".quant_state." in name


def _dequantize_4bit(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if not any("quant_state" in key for key in parts):
        raise ZOError(f"{name} is 4-bit, and its quantisation state is missing from the checkpoint")
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    return dequantize_4bit(tensors[name], state)


def write_dequantized(folder: StrPath, to: Path, name: str, max_shard_size: int | str) -> None:
    """Write the weights and the configuration of a quantised model folder in ``"bf16"`` or ``"fp32"``.

    Raises:
        ZOError: the folder is not quantised by bitsandbytes.
    """
    folder, dtype = Path(folder), DTYPES[name]
    settings = read_json(folder / "config.json")
    method = str(settings.get("quantization_config", {}).get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        raise ZOError(f"{folder} is quantised by {method}, and only bitsandbytes checkpoints can be dequantised")
    tensors: dict[str, Tensor] = {}
    files = weight_files(folder)
    for file in files:
        with open_safetensors(file) as stored:
            tensors.update({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118 (not a dict)
    facts = {"format": "pt", **read_metadata(files[0])}
    plain, turned = dequantize_tensors(tensors, dtype), _transposed_weights(folder)
    for key in turned & plain.keys():
        if tensors[key].dtype in (torch.int8, torch.uint8):
            plain[key] = plain[key].t().contiguous()
    write_tensors(plain, to, WEIGHTS, max_shard_size, facts)
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key, None)
    write_json(to / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})


def _transposed_weights(folder: StrPath) -> set[str]:
    """The names of the weights that the plain model stores transposed, unlike its quantised layers (GPT-2's family)."""
    kind, config = find_model_class(folder)
    if kind is None:
        return set()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = kind._from_config(config)
    return {f"{name}.weight" for name, module in model.named_modules() if lowering.is_transposed(type(module))}


def find_model_class(folder: StrPath) -> tuple[Any, Any]:
    """The ``transformers`` class that a model folder names (None if there is no such class), and its configuration."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, (config.architectures or [""])[0], None), config
