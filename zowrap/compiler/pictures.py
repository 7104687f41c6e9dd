"""Capture the features of pictures as one tensor: as a list with an entry for each they fix the number of pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_pictures(model: nn.Module) -> Iterator[None]:
    """Make the list that LLaVA models join afterwards one of a single entry while inside."""
    llava: Any = vars(sys.modules.get("transformers.models.llava.modeling_llava", sys)).get("LlavaModel")
    found: list[Any] = [] if llava is None else [m for m in model.modules() if isinstance(m, llava)]
    hooks = [
        each.multi_modal_projector.register_forward_hook(_join_pictures)
        for each in found
        if type(each).get_image_features is llava.get_image_features
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _join_pictures(_module: nn.Module, _inputs: Any, features: Tensor) -> Tensor:
    """``[pictures, patches, width]`` as ``[1, pictures · patches, width]``."""
    return features.flatten(0, 1).unsqueeze(0)
