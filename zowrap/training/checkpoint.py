"""Loading a checkpoint: its weights and the rule's state go back into the model bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zowrap.errors import ZOError
from zowrap.step.parameters import Parameter, canonical_name
from zowrap.step.pretrained import saved_part
from zowrap.storage import safetensors
from zowrap.storage.atomic import TMP, guard_write, read_json
from zowrap.storage.save import separate_parts

if TYPE_CHECKING:
    from zowrap.model.zo_model import ZOModel

STATE, TENSORS, TRAINER = "zo_state.json", "zo_state.safetensors", "trainer_state.json"
APART = "zo_apart.safetensors"  # what moves and the adapters in a run's root do not hold as it is: a prompt's encoder


def read_checkpoint_facts(directory: Path, name: str) -> dict[str, Any]:
    """Read the ``"environment"`` that a checkpoint was written in, or the ``"plan"`` of its run.

    Raises:
        ZOError: the folder is no checkpoint, or it is damaged.
    """
    facts = _read_state(directory).get(name)
    if not isinstance(facts, dict):
        raise ZOError(f"{directory / STATE} is damaged: its {name} is missing")
    return facts


def load_checkpoint(directory: str | os.PathLike[str], zm: ZOModel) -> dict[str, Any]:
    """Put the weights and the rule's state of a checkpoint into ``zm``, in place and bitwise.

    Returns:
        The Trainer's state.

    Raises:
        ZOError: the checkpoint is of another model, rule or set of options, or damaged.
    """
    directory = Path(directory)
    facts = _read_state(directory)
    tensors: dict[str, Tensor] = {}
    if (directory / TENSORS).is_file():
        with safetensors.open_safetensors(directory / TENSORS) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    apart = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    state = {name: t for name, t in tensors.items() if not name.startswith(("weights/", "scales/"))}
    stored = list(_stored_weights(directory, zm, apart))  # all checked before anything changes
    scales = list(_stored_scales(directory, zm, tensors))
    trainer_state = _read_object(directory / TRAINER)
    zm.load_state_dict({**facts, **state})
    _put(zm, stored)
    with torch.no_grad():
        for scale, value in scales:
            scale.copy_(value)
    return trainer_state


def _read_state(directory: Path) -> dict[str, Any]:
    if not (directory / STATE).is_file():
        if (directory / TRAINER).is_file():
            raise ZOError(
                f"{directory} holds a model alone, without the state that a run goes on from (as save_only_model "
                "writes it): begin a new run from that model"
            )
        raise ZOError(f"Can't find a valid checkpoint at {directory}: there is no {STATE} in it")
    return _read_object(directory / STATE)


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise ZOError(f"{file} is damaged: it holds no JSON object")
    return value


def load_weights(directory: str | os.PathLike[str], zm: ZOModel) -> None:
    """Put the weights that a model folder holds into ``zm``'s model, in place; the rule's state stays.

    Raises:
        ZOError: they are another model's.
    """
    file, apart = Path(directory) / APART, {}
    if file.is_file():
        with safetensors.open_safetensors(file) as opened:
            apart = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    _put(zm, list(_stored_weights(Path(directory), zm, apart)))


def keep_apart(directory: str | os.PathLike[str], zm: ZOModel) -> None:
    """Write what the adapters in a folder do not hold bit for bit to a file of its own, for :func:`load_weights`.

    peft saves of a prompt what its encoder makes, and not the encoder; and adapters under another name than they have
    in the model.
    """
    file = Path(directory) / APART
    adapted = safetensors.adapter_file(file.parent).is_file() or safetensors.named_adapters(file.parent)
    unsaved = [zm.parameters[index] for index in find_unsaved(zm, file.parent)] if adapted else []
    tensors = {p.name: p.tensor.detach().cpu().contiguous() for p in unsaved if p.scale is None}
    if not tensors:
        file.unlink(missing_ok=True)
        return
    beside = file.with_name(file.name + TMP)
    with guard_write(file, beside):
        save_file(tensors, beside, metadata={"format": "pt"})
        os.replace(beside, file)


def _put(zm: ZOModel, tensors: list[tuple[int, Tensor]]) -> None:
    with torch.no_grad():
        for index, stored in tensors:
            zm.parameters[index].tensor.copy_(stored)


def _stored_weights(directory: Path, zm: ZOModel, apart: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the parameter, its stored tensor), each checked to fit."""
    found = _stored_parameters(zm, directory)
    for index, parameter in enumerate(zm.parameters):
        stored = apart.get(parameter.name)
        if stored is None:
            if index not in found and parameter.scale is not None:
                stored = _log_scale(directory, zm, parameter)
            elif index not in found:
                raise ZOError(f"{directory} is of another model: it has no {parameter.name}")
            else:
                file, name = found[index]
                with safetensors.open_safetensors(file) as opened:
                    stored = opened.get_tensor(name)
        if stored.shape != parameter.tensor.shape or stored.dtype != parameter.tensor.dtype:
            raise ZOError(
                f"{directory} is of another model: {parameter.name} is {stored.dtype} of shape "
                f"{tuple(stored.shape)} there, {parameter.tensor.dtype} of shape {tuple(parameter.tensor.shape)} here"
            )
        yield index, stored


def _stored_scales(directory: Path, zm: ZOModel, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (scales, their stored values): those that the run began with, whichever model this one was loaded from."""
    for parameter in zm.parameters:
        if parameter.scale is None:
            continue
        value = tensors.get(f"scales/{parameter.name}")
        if value is None:
            raise ZOError(f"{directory} is of another model: it has no scales of {parameter.name}")
        if value.shape != parameter.scale.shape:
            raise ZOError(f"{directory} is of another model: the scales of {parameter.name} have another shape there")
        yield parameter.scale, value


def _log_scale(directory: Path, zm: ZOModel, parameter: Parameter) -> Tensor:
    """Return log(stored scale / the base's scale): the file of an 8-bit model holds the scales that tuning left."""
    _, prefix = saved_part(zm.model)
    layer = parameter.name.removesuffix("log_scale")
    wanted = (layer + "SCB", layer + "_weight_scale")  # bitsandbytes' name, torchao's
    for file in safetensors.weight_files(directory):
        with safetensors.open_safetensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                if canonical_name(prefix + name) in wanted and parameter.scale is not None:
                    base = parameter.scale.detach().float().cpu().reshape(-1)
                    ratio = opened.get_tensor(name).float().reshape(-1) / base
                    return torch.where(base > 0, ratio, 1.0).log()
    raise ZOError(f"{directory} is of another model: it has no {wanted[0]}")


def _stored_parameters(zm: ZOModel, directory: Path) -> dict[int, tuple[Path, str]]:
    """Find the tunable parameters in the weight files: index in ``zm.parameters`` → (file, name in it)."""
    _, prefix = saved_part(zm.model)
    where: dict[str, tuple[Path, str]] = {}
    for file in safetensors.weight_files(directory):
        with safetensors.open_safetensors(file) as opened:
            where.update({canonical_name(prefix + name): (file, name) for name in opened.keys()})  # noqa: SIM118
    for apart, prefix, module in separate_parts(zm.model):
        if (directory / apart).is_file():
            where.update({canonical_name(prefix + name): (directory / apart, name) for name in module.state_dict()})
    found = {}
    for index, parameter in enumerate(zm.parameters):
        name = next((n for n in map(canonical_name, parameter.names) if n in where), None)
        if name is not None:
            found[index] = where[name]
    return found


def find_unsaved(zm: ZOModel, directory: Path) -> list[int]:
    """Return the indices in ``zm.parameters`` of what the weight files in ``directory`` do not hold bit for bit.

    A checkpoint keeps these tensors apart: the base of an adapter, or weights that the file's format fuses or
    transposes.
    """
    found = _stored_parameters(zm, directory)
    return [i for i, p in enumerate(zm.parameters) if i not in found or not _holds(*found[i], p.tensor)]


def _holds(file: Path, name: str, tensor: Tensor) -> bool:
    """Whether the file holds exactly this tensor under that name: shape, dtype and every bit."""
    with safetensors.open_safetensors(file) as opened:
        if tuple(opened.get_slice(name).get_shape()) != tuple(tensor.shape):
            return False
        stored = opened.get_tensor(name)
    return stored.dtype == tensor.dtype and _bits(stored).equal(_bits(tensor.detach().cpu()))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
