"""Check that weights are finite, in one pass over each tensor and without a copy of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zowrap.errors import ZOWarning
from zowrap.step.parameters import canonical_name


def find_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Name → number of elements that are NaN or infinite, of the tensors that hold any.

    The smallest and the largest element tell: a NaN makes both NaN. What is quantised holds no floats and passes.
    """
    found = {}
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.element_size() < 2:
            continue
        # Axes in the order in which they lie in memory: aminmax then makes no copy.
        axes = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
        if not bool(torch.stack(torch.aminmax(tensor.detach().permute(axes))).isfinite().all()):
            found[name] = int(tensor.numel() - tensor.detach().isfinite().sum())
    return found


def warn_about(model: nn.Module) -> str | None:
    """Warn of weights of a model that are not finite before anything moved them, those that do not move among them.

    Returns:
        A clause that names the first, for the error of a run that cannot even start.
    """
    clauses = [
        f"the model's own {canonical_name(name)} holds {count:,} values that are not finite (NaN or an infinity)"
        for name, count in find_not_finite(model.named_parameters()).items()
    ]
    for clause in clauses:
        told = f"{clause}: steps on rows that need them are skipped, and they stay as they are"
        warnings.warn(told, ZOWarning, stacklevel=4)
    return clauses[0] if clauses else None
