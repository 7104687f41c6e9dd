"""Flatten a batch that holds lists and dictionaries of tensors, as engines want it, and nest it again for the model.

    {"pixel_values": x, "labels": [{"boxes": a, "id": 3}, {"boxes": b, "id": 4}]}      a [2, 4], b [1, 4]
    {"pixel_values": x, "*labels[].boxes": cat(a, b), "*labels[].boxes#": tensor([2, 1]), "*labels[].id:int": …}

A list of dictionaries, one for each row, becomes a few tensors whatever the number of rows, so that one program serves
them all. Anything else becomes a value for each path, ``"*images[0]"`` or ``"*more.mask"``. No keyword begins with
a star, so a flat batch is told from a nested one by its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zowrap.loss.heads import Batch

_COUNTS = "#"  # how many entries of the joined tensor each row has
_NUMBERS: dict[type, tuple[str, torch.dtype]] = {
    bool: (":bool", torch.bool),
    int: (":int", torch.int64),
    float: (":float", torch.float64),
}
_PATH = re.compile(r"\[(\d+)\]|\.([^.\[\]]+)")


def flatten_batch(batch: Mapping[str, Any]) -> Batch:
    """Flatten a batch; what holds no tensor stays as it is. The tensors that were nested come last."""
    flat: Batch = {}
    nested: Batch = {}
    for name, value in batch.items():
        if isinstance(value, list | tuple | Mapping) and not re.search(r"[.\[\]*]", name) and _holds_tensors(value):
            nested.update(_join_rows(f"*{name}", value) or _name_parts(f"*{name}", value))
        else:
            flat[name] = value
    return {**flat, **nested}


def nest_batch(flat: Mapping[str, Any]) -> Batch:
    """Undo :func:`flatten_batch`, with lists for tuples. Joined rows are split by counts that must be known."""
    batch: Batch = {}
    for name, value in flat.items():
        if not name.startswith("*"):
            batch[name] = value
            continue
        top = top_name(name)
        path = name[len(top) + 1 :]
        if not path.startswith("[]."):
            _put(batch, [top, *(int(i) if i else key for i, key in _PATH.findall(path))], value)
        elif not path.endswith(_COUNTS):
            _split_rows(batch.setdefault(top, []), path[3:], value, flat.get(name + _COUNTS))
    return {name: _finish(value) for name, value in batch.items()}


def is_joined(name: str) -> bool:
    """Whether a tensor of a flat batch holds the entries of all rows, or their counts."""
    return name.startswith("*") and "[]." in name


def top_name(name: str) -> str:
    """The keyword that a name of a flat batch belongs to."""
    return re.split(r"[\[.]", name[1:], maxsplit=1)[0] if name.startswith("*") else name


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and not re.search(r"[.\[\]#:]", k) for k in value) and any(
            _holds_tensors(v) for v in value.values()
        )
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def _join_rows(name: str, rows: Any) -> Batch | None:
    """The entries of a list of dictionaries, joined; None if they are not alike."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) and _holds_tensors(row) for row in rows):
        return None
    if any(row.keys() != rows[0].keys() for row in rows):
        return None
    joined: Batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        path = f"{name}[].{key}"
        if all(isinstance(value, Tensor) for value in values):
            if len({(v.dtype, v.shape[1:], v.ndim) for v in values}) > 1:
                return None
            if values[0].ndim:
                joined[path] = torch.cat(values)
                joined[path + _COUNTS] = torch.tensor([len(value) for value in values])
            else:
                joined[path] = torch.stack(values)
        elif type(values[0]) in _NUMBERS and len({type(value) for value in values}) == 1:
            mark, dtype = _NUMBERS[type(values[0])]
            joined[path + mark] = torch.tensor(values, dtype=dtype)
        else:
            return None
    return joined


def _split_rows(rows: list[Batch], key: str, joined: Tensor, counts: Tensor | None) -> None:
    """Give each row its entries of ``joined``."""
    number = next((mark for mark, _ in _NUMBERS.values() if key.endswith(mark)), None)
    parts: list[Any] = list(joined.unbind() if counts is None else joined.split(counts.tolist()))
    if number is not None:
        key, parts = key.removesuffix(number), joined.tolist()
    rows.extend({} for _ in range(len(parts) - len(rows)))
    for row, part in zip(rows, parts, strict=True):
        row[key] = part


def _name_parts(name: str, value: Any) -> Batch:
    """Each part of a value by its path."""
    if isinstance(value, Mapping) and _holds_tensors(value):
        return {path: part for key, v in value.items() for path, part in _name_parts(f"{name}.{key}", v).items()}
    if isinstance(value, list | tuple) and _holds_tensors(value):
        return {path: part for i, v in enumerate(value) for path, part in _name_parts(f"{name}[{i}]", v).items()}
    return {name: value}


class _Node(dict[Any, Any]):
    """A dictionary, or with numbers for keys a list, that is being put together."""


def _put(inside: dict[Any, Any], path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        inside = inside.setdefault(key, _Node())
    inside[path[-1]] = value


def _finish(value: Any) -> Any:
    """The list or dictionary that a node stands for."""
    if not isinstance(value, _Node):
        return value
    parts = {key: _finish(part) for key, part in value.items()}
    return [parts[i] for i in sorted(parts)] if all(isinstance(key, int) for key in parts) else parts
