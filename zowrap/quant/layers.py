"""Represent quantised linear layers as plain modules of tensors and library operators (*lowered* layers).

A lowered layer keeps a reference to the library's layer and shares its tensors, so nothing is copied, and lowering is
undone by putting that layer back. Its outputs equal the library's in evaluation mode, bit for bit. torchao is never
imported: its tensors are recognised by their attributes.
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
        scheme: the name of its quantisation scheme.
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
        """Write the current values into the original layer."""

    def detach_again(self) -> None:
        """Undo :meth:`write_back`, so that this layer can take the original's place again."""

    def dequantize(self) -> Tensor:
        """The weight that the codes currently represent: float32 ``[outputs, inputs]``."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save under the library's names with current values, so that ``save_pretrained`` works on a lowered model.

        ``keep_vars``, as ``torch.export`` uses it, asks for the variables themselves and gets those of this layer.
        """
        if keep_vars:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        self.write_back()
        try:
            self.original._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self.detach_again()


class Int8Linear(Lowered):
    """bitsandbytes' ``Linear8bitLt`` with int8 weights.

    Attributes:
        weight: the codes, int8 ``[outputs, inputs]``.
        SCB: float32 ``[outputs]``, the largest magnitude of each row; the weight is codes · SCB / 127.
        log_scale: float32 ``[outputs]`` if the scales move, which then are SCB · exp(log_scale); else None.
        delta: float32 ``[outputs, inputs]`` that an engine adds to the dequantised weight; else None.
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
        """The current scales: float32 ``[outputs]``."""
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
        """Make the current scales permanent: they no longer move."""
        if self.log_scale is not None:
            self.SCB.copy_(self.scale())
            self.log_scale = None

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        """Set codes and scales to those nearest to ``weight``, float32 ``[outputs, inputs]``."""
        largest = weight.abs().amax(dim=1)
        steps = torch.where(largest > 0, weight.t() * codes.LARGEST / largest, 0.0).t()
        self.weight.copy_(steps.round().to(torch.int8))
        self.SCB.copy_(largest)
        if self.log_scale is not None:
            self.log_scale.zero_()

    @torch.no_grad()
    def write_back(self) -> None:
        self.original.state.SCB = self.scale().detach()

    def detach_again(self) -> None:
        self.original.state.SCB = self.SCB

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        return codes.dequantize(self.weight, codes.unit_of(self.scale()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load from the library's names: the file's scales become ``SCB``, and ``log_scale`` restarts at 0."""
        state_dict.pop(f"{prefix}weight_format", None)
        if self.log_scale is not None:
            state_dict.setdefault(f"{prefix}log_scale", torch.zeros_like(self.log_scale))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Nf4Linear(Lowered):
    """bitsandbytes' ``Linear4bit``, NF4 or FP4, double quantisation included.

    On a processor with bfloat16 instructions the library repacks a layer at its first forward, with rounded block
    scales, and forgets the exact scales. This class repacks the codes as well (their order carries no information),
    but keeps the exact scales to restore the original layer.

    Attributes:
        weight: uint8, two codes per byte.
        absmax: the largest magnitude of each block of the weight, as 8-bit codes under double quantisation.
        code: float32 ``[16]``, the value of each code.
        absmax_scale, absmax_code, absmax_offset: how to read ``absmax`` under double quantisation; else None.
    """

    scheme = "bitsandbytes 4-bit"

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(original)
        self.exact = state = original.weight.quant_state
        stored = original.weight.data
        self.repacked = False
        if _would_repack(original, state) and not getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu

            stored, state = _convert_weight_packed_for_cpu(stored, copy.copy(state))
            self.repacked = True
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
        if self.repacked:
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
        """The dtype that the library picks at the first forward: the input's own if it is safe to compute in."""
        if self.safe_dtypes and x.dtype in (torch.float32, torch.bfloat16):
            return x.dtype
        return self.compute_dtype or x.dtype

    def write_back(self) -> None:
        if self.repacked:
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            self.original.weight.data, _ = _convert_weight_packed_for_cpu_inverse(
                self.weight.data, copy.copy(self.state)
            )
        # If the library repacked the codes, it unpacks them on saving and modifies this state: give it a copy.
        state = copy.copy(self.exact) if self.packed and not self.repacked else self.exact
        self.original.weight.quant_state = self.original.quant_state = state

    def detach_again(self) -> None:
        self.original.weight.data = self.weight.data

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        stored, state = self.weight.data, self.state
        if self.packed:
            stored, state = _convert_weight_packed_for_cpu_inverse(stored, copy.copy(state))
        return dequantize_4bit(stored, self.exact if self.repacked else state).float()


def _would_repack(original: Any, state: Any) -> bool:
    """Whether the library would repack this layer's codes at its first forward."""
    rows, columns = state.shape
    fits = rows % 32 == 0 and columns % state.blocksize == 0
    return original.weight.device.type == "cpu" and bool(original.support_avx512bf16_for_cpu) and fits


def is_int8_weight_only(weight: Any) -> bool:
    """Whether a weight is torchao's ``Int8Tensor`` with symmetric codes, one scale per row and unquantised inputs."""
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao"):
        return False
    by_row = tuple(weight.scale.shape) == (weight.qdata.shape[0], 1)
    return by_row and weight.act_quant_kwargs is None and not _has_zero_point(weight)


def _has_zero_point(weight: Any) -> bool:
    return weight.zero_point is not None and bool(weight.zero_point.any())


class TorchaoLinear(Lowered):
    """A linear layer with an ``Int8Tensor`` weight: y = (x · codesᵀ) · scale + bias.

    Attributes:
        weight: the codes, int8 ``[outputs, inputs]``.
        row_scale: ``[outputs, 1]`` in the dtype that the model computes in.
        log_scale: float32 ``[outputs]`` if the scales move, which then are row_scale · exp(log_scale); else None.
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
        """The current scales: ``[outputs, 1]``."""
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

    def detach_again(self) -> None:
        self.original.weight.scale = self.row_scale

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale().float()
