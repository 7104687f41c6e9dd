"""The hashes of what moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zowrap.step.parameters import Parameter, hash_shapes, hash_shapes_and_dtypes, select


def parameters(model: nn.Module) -> list[Parameter]:
    return select(model)


@pytest.mark.parametrize("hash_of", [hash_shapes, hash_shapes_and_dtypes])
def test_names_and_shapes_change_the_hash_and_values_do_not(hash_of: Callable[..., str]) -> None:
    found = hash_of(parameters(nn.Linear(4, 2)))
    assert len(found) == 16 and int(found, 16) >= 0
    assert found == hash_of(parameters(nn.Linear(4, 2)))
    others = [nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 2)), nn.Linear(4, 2, bias=False)]
    assert len({found, *(hash_of(parameters(other)) for other in others)}) == 4


def test_noise_does_not_depend_on_dtypes_and_a_run_does() -> None:
    full, half = parameters(nn.Linear(4, 2)), parameters(nn.Linear(4, 2).to(torch.bfloat16))
    assert hash_shapes(full) == hash_shapes(half)
    assert hash_shapes_and_dtypes(full) != hash_shapes_and_dtypes(half)


def test_hashes_in_files_stay_what_they_are() -> None:
    moving = parameters(nn.Linear(4, 2))
    assert (hash_shapes(moving), hash_shapes_and_dtypes(moving)) == ("db1c493d10c134ec", "ca8bd32a649a85a6")
