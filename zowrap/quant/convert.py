"""Quantised checkpoints as plain 16- or 32-bit ones, and adapters merged into their base: what export does with them.

Serving engines and converters to other formats take 16-bit weights; few take the scales of an 8-bit checkpoint, and
fewer adapters. The dequantised weights are those that the 8-bit model multiplies by, but its activations are no longer
rounded: :func:`output_error` says what that comes to.

A folder of adapters does not say how its base was loaded. The header of its weights does, as ``base_options``.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line, nearest
from zowrap.files import read_json, write_json
from zowrap.names import FORMATS
from zowrap.quant import codes, lowering
from zowrap.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    LABEL_VECTORS,
    WEIGHTS,
    Path_,
    adapters_base,
    check_adapter_settings,
    opened,
    read_metadata,
    weight_files,
    write_tensors,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROBE_ROWS, PROBE_LENGTH = 8, 32  # of random token ids


def check_format(name: str) -> None:
    """Raise :class:`ZOError` for a format that is not one of :data:`zowrap.names.FORMATS`."""
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
    return {f"{name}.weight" for name, module in model.named_modules() if lowering.is_turned(type(module))}


def output_error(folder: Path_, plain: Path_, name: str) -> tuple[float | None, str | None]:
    """How far a plain copy's outputs are from those of the quantised model, or of its adapters, that it was made of.

    Outputs are logits, or the last hidden state of a model without a head, on rows of token ids that are always the
    same.

    Args:
        folder: the quantised model, ``plain`` its copy in ``"bf16"`` or ``"fp32"``.

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
        model = adapted(folder)
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


def _class_of(folder: Path_) -> tuple[Any, Any]:
    """The ``transformers`` class that a model folder names, None where there is none, and its configuration."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, (config.architectures or [""])[0], None), config


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


def copy_adapters(folder: Path_, to: Path) -> None:
    """Copy the adapters of a folder: their weights and their configuration.

    Raises:
        ZOError: it holds none.
    """
    for name in (ADAPTER, ADAPTER_CONFIG):
        if not (Path(folder) / name).is_file():
            raise ZOError(f"{folder} holds no adapters: there is no {name} in it")
        shutil.copyfile(Path(folder) / name, to / name)
    if (Path(folder) / LABEL_VECTORS).is_file():
        shutil.copyfile(Path(folder) / LABEL_VECTORS, to / LABEL_VECTORS)


# --- adapters and the base they were tuned on -----------------------------------------------------------------------


def base_options(model: nn.Module) -> dict[str, str]:
    """For the header of a file of adapters: of what class their base is, and how it was loaded."""
    config: Any = getattr(model, "config", None)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    facts: dict[str, Any] = {"architecture": type(inner).__name__}
    if getattr(config, "num_labels", None):
        facts["num_labels"] = config.num_labels
    if isinstance(getattr(inner, "dtype", None), torch.dtype):
        facts["dtype"] = str(inner.dtype).removeprefix("torch.")
    settings = lowering.quantization_of(config)
    if settings.get("quant_method") == "bitsandbytes":  # others are quantised on the disk already
        facts["quantization"] = settings
    return {"base_options": json.dumps(facts, default=str)}


def read_base_options(folder: Path_) -> dict[str, Any]:
    """What :func:`base_options` wrote into a folder of adapters; of one that does not say, what its run's options say.

    ``"quantization"``, where there is one, holds arguments of ``BitsAndBytesConfig``.
    """
    from zowrap.quant import quantization

    facts = json.loads(read_metadata(Path(folder) / ADAPTER).get("base_options", "{}"))
    options = _run_of(folder).get("options") or {}
    if not facts:
        facts = {"dtype": options.get("dtype"), "quantization": quantization(options)}
    if facts.get("quantization"):
        from transformers import BitsAndBytesConfig

        known = inspect.signature(BitsAndBytesConfig.__init__).parameters
        facts["quantization"] = {name: value for name, value in facts["quantization"].items() if name in known}
    return facts


def load_options(folder: Path_) -> dict[str, Any]:
    """Arguments with which ``from_pretrained`` loads a folder of adapters as they were tuned: how their base is loaded.

    ``AutoModelForSequenceClassification.from_pretrained(RUN, **load_options(RUN))``

    Returns:
        ``dtype``, ``num_labels`` and ``quantization_config``, as far as they are known; nothing for a folder with a
        whole model, whose configuration says all that.
    """
    if not (Path(folder) / ADAPTER).is_file():
        return {}
    facts = read_base_options(folder)
    options: dict[str, Any] = {}
    if facts.get("dtype"):
        options["dtype"] = getattr(torch, facts["dtype"])
    if facts.get("num_labels"):
        options["num_labels"] = facts["num_labels"]
    if facts.get("quantization"):
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(**facts["quantization"])
    return options


def _run_of(folder: Path_) -> dict[str, Any]:
    """``zowrap.json`` of a RUN; empty for any other folder."""
    file = Path(folder) / "zowrap.json"
    return read_json(file) if file.is_file() else {}


def adapted(folder: Path_) -> Any:
    """The ``transformers`` model of a folder of adapters: the base as it was tuned, with the adapters on it.

    Raises:
        ZOError: there are no adapters, or their base cannot be loaded.
    """
    import transformers

    from zowrap.export import saved_part
    from zowrap.tasks import Source, from_record, open_source
    from zowrap.tasks.loading import DTYPES as NAMES
    from zowrap.tasks.loading import load

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


def merged(folder: Path_, form: str) -> tuple[Any, dict[str, float]]:
    """The base of a folder of adapters with them merged in, and for each layer the part of its change that is lost.

    Args:
        form: ``"merged"`` into the base's own precision, or one of :data:`DTYPES`: the whole model then is a plain one.

    Raises:
        ZOError: there are no adapters, or the base's precision holds too little for them.
    """
    from zowrap.quant import adapters

    model, dtype = adapted(folder), DTYPES.get(form)
    lowering.lower(model)
    errors = adapters.merge(model, dtype)
    if dtype is None:
        lowering.raise_back(model)
    else:
        lowering.dequantize(model, dtype)
    return model, errors
