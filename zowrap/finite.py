"""Whether weights are numbers: one pass over each tensor, and nothing as large as a tensor beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.parameters import Parameter, canonical_name


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None where none does.

    The smallest and the largest element tell: a NaN makes both NaN. What is quantised holds no floats and passes.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.element_size() < 2:
            continue
        # Axes in the order in which they lie in memory: aminmax then makes no copy.
        axes = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
        if not bool(torch.stack(torch.aminmax(tensor.detach().permute(axes))).isfinite().all()):
            return name
    return None


def check_model(model: nn.Module) -> None:
    """Check the weights that a training is to start from, those that move and those that do not.

    Raises:
        ZOError: one holds NaN or an infinity.
    """
    name = first_not_finite(model.named_parameters())
    if name is not None:
        raise ZOError(
            f"{canonical_name(name)} of the model holds values that are not finite (NaN or an infinity): "
            "there is nothing to start from; load weights that are whole"
        )


def moved_wrong(parameters: Iterable[Parameter]) -> str | None:
    """Name of the first parameter that is not finite, of those that move."""
    return first_not_finite((parameter.name, parameter.tensor) for parameter in parameters)
