"""Capture a forward that converts one of its modules to another dtype, as routers of experts do.

    self.classifier = self.classifier.to(torch.float32)

Torch exchanges the memory of the weights, and cannot do that with the ones that export has put in their place. As an
operation on them it is part of the program; export puts the weights themselves back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_conversions() -> Iterator[None]:
    """Make ``Module.to`` and its like put the converted tensors in the place of a module's own while inside."""
    plain = nn.Module._apply
    nn.Module._apply = _convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = plain  # type: ignore[method-assign]


def _convert(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for module in self.modules() if recurse else [self]:
        places: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in places:
            tensors.update({name: function(t) for name, t in tensors.items() if t is not None})
    return self
