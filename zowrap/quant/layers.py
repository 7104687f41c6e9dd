"""Lowered layers: a quantised linear layer as a plain module of tensors and library operators.

A lowered layer keeps the library's layer beside it and shares its tensors, so nothing is copied, and going back is
putting that layer back. Its outputs are the library's in evaluation mode, bit for bit. torchao is imported nowhere:
its tensors are known by what they hold.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.numerics import codes
from zowrap.ops import int8  # noqa: F401 (registers torch.ops.zowrap)


class Lowered(nn.Module):
    """A quantised layer in plain form.

    Attributes:
        original: the library's layer; not a submodule.
        scheme: the name of its kind of quantisation.
    """

    scheme = ""
    original: Any
    in_features: int
    out_features: int

    def __init__(self, original: Any) -> None:
        super().__init__()
        object.__setattr__(self, "original", original)
        self.bias = original.bias
        self.in_features, self.out_features = original.in_features, original.out_features
        self.training = False

    def write_back(self) -> None:
        """Give the original layer the values that this one has now."""

    def take_again(self) -> None:
        """After :meth:`write_back`: as it was before, for the original is to be set aside again."""

    def dequantized(self) -> Tensor:
        """float32 ``[outputs, inputs]``: the weight that the codes stand for now."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The library's own names and present values: a lowered model's ``save_pretrained`` then loses nothing.

        Who asks for the variables themselves (``keep_vars``, as ``torch.export`` does) gets those of this layer.
        """
        if keep_vars:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        self.write_back()
        try:
            self.original._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self.take_again()


class Int8Linear(Lowered):
    """bitsandbytes' ``Linear8bitLt`` with int8 weights.

    Attributes:
        weight: the codes, int8 ``[outputs, inputs]``.
        SCB: float32 ``[outputs]``, the largest magnitude of each row; the weight is codes · SCB / 127.
        log_scale: float32 ``[outputs]`` where the scales move: they are SCB · exp(log_scale). Else None.
        delta: what an engine adds to the dequantised weight, float32 ``[outputs, inputs]``. Else None.
        threshold: see :func:`zowrap.ops.int8.products`.
    """

    scheme = "bitsandbytes int8"
    SCB: Tensor
    log_scale: nn.Parameter | None
    delta: Tensor | None

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        if original.weight.CB is not None:
            original.init_8bit_state()
        original.weight.data = original.state.CB
        self.weight = nn.Parameter(original.weight.data, requires_grad=False)
        self.register_buffer("SCB", original.state.SCB)
        self.register_parameter("log_scale", None)
        self.register_buffer("delta", None)
        self.threshold = float(original.state.threshold)

    def scale(self) -> Tensor:
        """float32 ``[outputs]``: the scales as they are now."""
        return self.SCB if self.log_scale is None else self.SCB * self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = torch.ops.zowrap.int8_linear(x, self.weight, self.scale(), bias, self.threshold)
        if self.delta is not None:
            y = (y.float() + nn.functional.linear(x.float(), self.delta)).to(x.dtype)
        return y

    def free_scales(self) -> nn.Parameter:
        """Let the scales move: returns ``log_scale``, which starts at 0."""
        if self.log_scale is None:
            self.log_scale = nn.Parameter(torch.zeros_like(self.SCB), requires_grad=False)
        return self.log_scale

    @torch.no_grad()
    def fix_scales(self) -> None:
        """Take the scales as they are now for good: they no longer move."""
        if self.log_scale is not None:
            self.SCB.copy_(self.scale())
            self.log_scale = None

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        """Take the codes and scales that are nearest to ``weight``, float32 ``[outputs, inputs]``."""
        largest = weight.abs().amax(dim=1)
        steps = torch.where(largest > 0, weight.t() * codes.LARGEST / largest, 0.0).t()
        self.weight.copy_(steps.round().to(torch.int8))
        self.SCB.copy_(largest)
        if self.log_scale is not None:
            self.log_scale.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        self.original.state.SCB = self.scale().detach()

    def take_again(self) -> None:
        self.original.state.SCB = self.SCB

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        return codes.values(self.weight, codes.unit_of(self.scale()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take the library's names: the scales of the file, from which the logarithms then start at 0."""
        state_dict.pop(f"{prefix}weight_format", None)
        if self.log_scale is not None:
            state_dict.setdefault(f"{prefix}log_scale", torch.zeros_like(self.log_scale))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Nf4Linear(Lowered):
    """bitsandbytes' ``Linear4bit``, NF4 or FP4, double quantisation included.

    A processor with bfloat16 instructions multiplies another layout of the codes, with rounded block scales; the
    library turns its layer into that at the first forward and forgets the exact scales. This one does not forget: the
    codes are turned (no information is in their order), the exact scales are kept for the way back.

    Attributes:
        weight: the codes, two to a byte, uint8.
        absmax: the largest magnitude of each block of the weight, 8-bit codes of it where quantised twice.
        code: float32 ``[16]``, the values that codes stand for.
        absmax_scale, absmax_code, absmax_offset: how ``absmax`` is read where quantised twice; else None.
    """

    scheme = "bitsandbytes 4-bit"

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(original)
        self.exact = state = original.weight.quant_state
        stored = original.weight.data
        self.turned = False
        if _takes_packed(original, state) and not getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu

            stored, state = _convert_weight_packed_for_cpu(stored, copy.copy(state))
            self.turned = True
        self.packed = bool(getattr(state, "packing_format_for_cpu", False))
        self.shape, self.blocksize, self.quant_type = list(state.shape), state.blocksize, state.quant_type
        self.compute_dtype, self.safe_dtypes = original.compute_dtype, not original.compute_type_is_set
        self.weight = nn.Parameter(stored, requires_grad=False)
        nested = state.nested and not self.packed
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)
        self.register_buffer("absmax_scale", state.state2.absmax if nested else None)
        self.register_buffer("absmax_code", state.state2.code if nested else None)
        self.register_buffer("absmax_offset", state.offset if nested else None)
        self.state = state
        if self.turned:
            original.weight.data = stored

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        given = x.to(dtype)
        if self.packed:
            y = torch.ops.zowrap.nf4_linear(
                given, self.weight, self.absmax, self.code, self.shape, self.blocksize, bias
            )
        elif self.absmax_scale is None:
            y = torch.ops.bitsandbytes.gemm_4bit(
                given, self.weight.view(-1, 1), self.shape, self.absmax, self.blocksize, self.quant_type, bias=bias
            )
        else:
            y = torch.ops.bitsandbytes.gemm_4bit(
                given,
                self.weight.view(-1, 1),
                self.shape,
                self.absmax_scale,
                self.blocksize,
                self.quant_type,
                bias=bias,
                absmax_8bit=self.absmax,
                absmax_code=self.absmax_code,
                absmax_offset=self.absmax_offset,
            )
        return y.to(x.dtype)

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """As the library settles it at the first forward: the input's own where that is safe to compute in."""
        if self.safe_dtypes and x.dtype in (torch.float32, torch.bfloat16):
            return x.dtype
        return self.compute_dtype or x.dtype

    def write_back(self) -> None:
        if self.turned:
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            self.original.weight.data, _ = _convert_weight_packed_for_cpu_inverse(
                self.weight.data, copy.copy(self.state)
            )
        # A copy where the library is to turn the codes itself on saving: it then changes the state it is given.
        state = copy.copy(self.exact) if self.packed and not self.turned else self.exact
        self.original.weight.quant_state = self.original.quant_state = state

    def take_again(self) -> None:
        self.original.weight.data = self.weight.data

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        stored, state = self.weight.data, self.state
        if self.packed:
            stored, state = _convert_weight_packed_for_cpu_inverse(stored, copy.copy(state))
        return dequantize_4bit(stored, self.exact if self.turned else state).float()


def _takes_packed(original: Any, state: Any) -> bool:
    """Whether the library would turn this layer's codes at its first forward, and can."""
    rows, columns = state.shape
    fits = rows % 32 == 0 and columns % state.blocksize == 0
    return original.weight.device.type == "cpu" and bool(original.support_avx512bf16_for_cpu) and fits


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
