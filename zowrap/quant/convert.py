"""Quantised checkpoints as plain 16- or 32-bit ones, and adapters merged into their base: what export does with them.

Serving engines and converters to other formats take 16-bit weights; few take the scales of an 8-bit checkpoint. The
dequantised weights are those that the 8-bit model multiplies by, but its activations are no longer rounded:
:func:`output_error` says what that comes to.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zowrap.errors import ZOError, nearest
from zowrap.files import read_json, write_json
from zowrap.quant import codes
from zowrap.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    WEIGHTS,
    Path_,
    adapters_base,
    opened,
    read_metadata,
    weight_files,
    write_tensors,
)

FORMATS = ("same", "bf16", "fp32", "adapters", "merged")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROBE_ROWS, PROBE_LENGTH = 8, 32  # of random token ids


def check_format(name: str) -> None:
    """Raise :class:`ZOError` for a format that is not one of :data:`FORMATS`."""
    if name not in FORMATS:
        raise ZOError(f"unknown --format {name!r}{nearest(name, FORMATS)}")


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
            result[name] = codes.values(tensor, codes.unit_of(tensors[f"{stem}SCB"])).to(dtype)
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
    write_tensors(dequantized(tensors, dtype), to, WEIGHTS, max_shard_size, facts)
    for key in ("quantization_config", "torch_dtype"):
        settings.pop(key, None)
    write_json(to / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})


def output_error(folder: Path_, plain: Path_, name: str) -> float | None:
    """How far a plain copy's outputs are from those of the quantised model that it was made of.

    Outputs are logits, or the last hidden state of a model without a head, on rows of token ids that are always the
    same.

    Args:
        folder: the quantised model, ``plain`` its copy in ``"bf16"`` or ``"fp32"``.

    Returns:
        The root mean square of the difference over the standard deviation of the quantised model's outputs. None for a
        model that ``transformers`` has no class for.
    """
    wanted = _outputs(folder)
    found = _outputs(plain, dtype=DTYPES[name])
    if wanted is None or found is None:
        return None
    return float((found - wanted).square().mean().sqrt() / wanted.std())


@torch.no_grad()
def _outputs(folder: Path_, **options: Any) -> Tensor | None:
    """float32 ``[rows, ...]``; one row at a time, for some heads take more only with a padding token."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        return None
    model = kind.from_pretrained(folder, use_safetensors=True, **options).eval()
    text = config.get_text_config()
    length = min(PROBE_LENGTH, getattr(text, "max_position_embeddings", None) or PROBE_LENGTH)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(text.vocab_size, (PROBE_ROWS, length), generator=draw).to(model.device)
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    given = [model(**dict.fromkeys(names, row)) for row in ids.split(1)]
    return torch.cat([out["logits" if "logits" in out else "last_hidden_state"] for out in given]).float()


def copy_adapters(folder: Path_, to: Path) -> None:
    """Copy the adapters of a folder: their weights and their configuration.

    Raises:
        ZOError: it holds none.
    """
    for name in (ADAPTER, ADAPTER_CONFIG):
        if not (Path(folder) / name).is_file():
            raise ZOError(f"{folder} holds no adapters: there is no {name} in it")
        shutil.copyfile(Path(folder) / name, to / name)


def merged(folder: Path_, options: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
    """The base of a folder of adapters with them merged in, and for each 8-bit layer what its 8 bits lost.

    Args:
        options: ``load_in_8bit`` or ``load_in_4bit`` of the run: how the base was loaded.

    Raises:
        ZOError: there are no adapters, or the base is 4-bit.
    """
    import transformers

    from zowrap.quant import adapters, quantization

    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise ZOError(f"{folder} holds no adapters to merge: there is no {ADAPTER} in it")
    if options.get("load_in_4bit"):
        raise ZOError("adapters on a 4-bit base are not merged into 4 bits, which would lose them: --format adapters")
    config = transformers.AutoConfig.from_pretrained(adapters_base(folder) or folder)
    kind: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    settings = quantization(options)
    more = {} if settings is None else {"quantization_config": transformers.BitsAndBytesConfig(**settings)}
    model = kind.from_pretrained(adapters_base(folder) or folder, use_safetensors=True, **more).eval()
    errors = adapters.merge_from(model, folder)
    return model, errors
