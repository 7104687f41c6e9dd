"""A nested batch is flattened and comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zowrap.loss.nested import flatten_batch, is_joined, nest_batch


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def boxes(count: int, number: int) -> dict[str, Any]:
    """What a row of a detector's labels may hold."""
    return {
        "boxes": torch.rand(count, 4),
        "class_labels": torch.arange(count),
        "image_id": number,
        "area": torch.tensor(number / 2),
        "crowd": number % 2 == 0,
    }


BOXES = [boxes(2, 3), boxes(0, 4), boxes(1, 5)]


@pytest.mark.parametrize(
    "value",
    [
        BOXES,
        BOXES[:1],
        [{"masks": torch.rand(2, 4, 5)}, {"masks": torch.rand(1, 3, 3)}],  # not to be joined
        [{"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}],
        [{"a": torch.ones(1), "name": "x"}, {"a": torch.ones(1), "name": "y"}],
        {"mask": torch.ones(2), "more": {"deep": [torch.ones(1), 7]}},
        [torch.ones(2), torch.zeros(3)],
        ["no", "tensors"],
        {0: torch.ones(2)},
        [{0: "x", 1: "y"}, torch.ones(2)],
        None,
    ],
)
def test_there_and_back(value: Any) -> None:
    batch = {"labels": value, "x": torch.ones(3, 2), "flag": True}
    flat = flatten_batch(batch)
    assert same(batch, nest_batch(flat))
    assert {name for name, v in flat.items() if not isinstance(v, list | dict)} >= {"x", "flag"}


def test_the_tensors_of_all_rows_are_few_and_come_last() -> None:
    names = [list(flatten_batch({"labels": BOXES[:rows], "x": torch.ones(rows)})) for rows in (1, 2, 3)]
    assert names[0] == names[1] == names[2] and names[0][0] == "x" and len(names[0]) == 8
    assert all(map(is_joined, names[0][1:]))


def test_a_flat_batch_stays_itself() -> None:
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.ones(2), "return_loss": True}
    assert same(batch, flatten_batch(batch)) and same(batch, nest_batch(batch))
