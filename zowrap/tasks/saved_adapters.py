"""Put the adapters of a folder on their base, as peft itself loads them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from zowrap.errors import ZOError, first_line, need_package
from zowrap.numerics.dtypes import is_16_bit
from zowrap.step.parameters import canonical_name
from zowrap.storage.safetensors import (
    ADAPTER,
    StrPath,
    adapter_file,
    adapters_folder,
    check_adapter_settings,
    open_safetensors,
    read_shapes,
)


def stored_names(folder: StrPath) -> set[str]:
    """The canonical names of the weights in a folder of adapters, which its base need not have."""
    file = adapter_file(folder)
    if not file.is_file():
        return set()
    return set(map(canonical_name, read_shapes(file)))


def attach_saved(base: Any, folder: StrPath) -> nn.Module:
    """Put the adapters of ``folder`` on ``base`` and return peft's model of both, in evaluation mode.

    A base whose vocabulary was extended before it was tuned is given as many rows first.

    Raises:
        ZOError: peft is not installed, the adapters are of another base, or some of their weights are missing.
    """
    folder = adapters_folder(folder)
    check_adapter_settings(folder)
    need_package("peft", f"{folder} holds adapters: they need")
    from peft import PeftModel

    _extend_vocabulary(base, folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(
                base, str(folder), torch_device="cpu", autocast_adapter_dtype=_is_wider(folder, base)
            )
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ZOError(f"the adapters of {folder} do not fit {_name(base)}: {first_line(error)}") from error
    missing = next((str(each.message) for each in said if "missing adapter keys" in str(each.message)), None)
    if missing is not None:
        raise ZOError(f"the adapters of {folder} do not fit {_name(base)}: {first_line(missing)}")
    return model.eval()


def _name(base: Any) -> str:
    return getattr(base.config, "_name_or_path", None) or type(base).__name__


def _is_wider(folder: Path, base: nn.Module) -> bool:
    """Whether the file's weights have more bits than the base's: peft would else round them to the base's dtype."""
    if not any(is_16_bit(parameter) for parameter in base.parameters()):
        return False
    with open_safetensors(folder / ADAPTER) as tensors:
        return any(tensors.get_slice(name).get_dtype() == "F32" for name in tensors.keys())  # noqa: SIM118


def _extend_vocabulary(base: Any, folder: Path) -> None:
    """Give the embeddings of ``base`` as many rows as those that are stored with the adapters.

    Raises:
        ZOError: the input embedding was extended, and the head's rows for the new tokens are not stored.
    """
    wanted, held = _stored_rows(base, folder, base.get_input_embeddings), _rows(base.get_input_embeddings)
    if wanted is None or held is None or wanted == held:
        return
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    tied = head is None or head.weight is base.get_input_embeddings().weight
    if not tied and _stored_rows(base, folder, base.get_output_embeddings) != wanted:
        raise ZOError(
            f"the adapters of {folder} hold an embedding of {wanted} tokens for a base of {held}, but not the rows of "
            "its head for the new ones: save them with save_embedding_layers=True"
        )
    base.resize_token_embeddings(wanted, mean_resizing=False)


def _rows(find: Any) -> int | None:
    weight = getattr(find(), "weight", None)
    return None if weight is None else weight.shape[0]


def _stored_rows(base: Any, folder: Path, find: Any) -> int | None:
    """The number of rows that the file of adapters holds of an embedding; None if it holds none."""
    module = find()
    name = next((name for name, each in base.named_modules() if each is module), None)
    names = {f"{name}.weight", f"{name}.token_adapter.weight"}
    for key, shape in read_shapes(folder / ADAPTER).items():
        if canonical_name(key) in names or canonical_name(key.removeprefix("base_model.")) in names:
            return shape[0]
    return None
