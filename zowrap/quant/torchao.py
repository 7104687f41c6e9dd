"""torchao's int8 weight-only layers. torchao is imported nowhere: its tensors are known by what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zowrap.quant.linear import Lowered


def is_int8_weight_only(weight: Any) -> bool:
    """Whether a weight is torchao's ``Int8Tensor``: symmetric codes, a scale by row, inputs in their own dtype."""
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao"):
        return False
    by_row = tuple(weight.scale.shape) == (weight.qdata.shape[0], 1)
    return by_row and weight.act_quant_kwargs is None and not _shifted(weight)


def _shifted(weight: Any) -> bool:
    return weight.zero_point is not None and bool(weight.zero_point.any())


class TorchaoLinear(Lowered):
    """A linear layer with an ``Int8Tensor`` weight: y = (x · codesᵀ) · scale + bias.

    Attributes:
        weight: the codes, int8 ``[outputs, inputs]``.
        row_scale: ``[outputs, 1]`` in the dtype that the model computes in.
        log_scale: float32 ``[outputs]`` where the scales move: they are row_scale · exp(log_scale). Else None.
    """

    scheme = "torchao int8"
    row_scale: Tensor
    log_scale: nn.Parameter | None

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.weight = nn.Parameter(original.weight.qdata, requires_grad=False)
        self.register_buffer("row_scale", original.weight.scale)
        self.register_parameter("log_scale", None)

    def scale(self) -> Tensor:
        """``[outputs, 1]``: the scales as they are now."""
        if self.log_scale is None:
            return self.row_scale
        return (self.row_scale.float() * self.log_scale.exp().unsqueeze(1)).to(self.row_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.mm(x.reshape(-1, x.shape[-1]), self.weight.t().to(x.dtype))
        y = (y * self.scale().reshape(-1)).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def free_scales(self) -> nn.Parameter:
        """Let the scales move: returns ``log_scale``, which starts at 0."""
        if self.log_scale is None:
            self.log_scale = nn.Parameter(
                torch.zeros(self.out_features, device=self.weight.device), requires_grad=False
            )
        return self.log_scale

    @torch.no_grad()
    def write_back(self) -> None:
        self.original.weight.scale = self.scale().detach()

    def take_again(self) -> None:
        self.original.weight.scale = self.row_scale

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        return self.weight.float() * self.scale().float()
