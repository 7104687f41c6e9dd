"""Give each example of a batch its own direction.

    before                                    after
    program(ids [rows, n], factors [size])    vmap(program)(ids [rows, 1, n], factors [rows, size])

The program is recorded again under ``torch.vmap`` over the examples. Each example is a batch of one with its own
factors. The weights have no example dimension, so each product with a weight stays one product for the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op
from zowrap.compiler.inductor import size_oblivious
from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError, ZOInternalError, first_line
from zowrap.numerics.dtypes import at_least_float32
from zowrap.passes.manager import Pass


class Population(Pass):
    """Record the program again for each example; see the module docstring.

    Batch inputs are per example, except those with a single row, which all examples share, as in
    :func:`zowrap.loss.module.per_example_names`. This holds even where the model does not require the numbers of rows
    to agree: attention takes a mask with any number of rows.
    """

    name = "population"

    def requires(self, program: Program) -> None:
        if program.placeholder("added", "factors") is None:
            raise ZOInternalError("only low-rank directions can differ between the examples of a batch")

    def call(self, program: Program) -> str:
        inner = _Mapped(program.graph_module)
        rows = self._rows(program)
        fakes = program.fakes()
        dims: list[int | None] = []
        for i, (given, value) in enumerate(zip(program.inputs, fakes, strict=True)):
            mapped = given.kind == "batch" and isinstance(value, torch.Tensor) and value.ndim and not _one_row(value)
            if mapped and not _varies(value):
                raise ZOCaptureError(_FIXED)
            if mapped and str(value.shape[0]) != str(rows):
                fakes[i] = self._per_example(program, value[0], rows)
            if given.kind == "added" and given.target == "factors":
                fakes[i] = self._per_example(program, value, rows)
                mapped = True
            dims.append(0 if mapped else None)
        batch = [d is not None and g.kind == "batch" for d, g in zip(dims, program.inputs, strict=True)]

        def one(*inputs: Any) -> tuple[Any, ...]:
            outputs = inner.run(*[x.unsqueeze(0) if b else x for x, b in zip(inputs, batch, strict=True)])
            return tuple(out.reshape(()) for out in outputs)

        def all_examples(*inputs: Any) -> tuple[Any, ...]:
            return torch.vmap(one, in_dims=tuple(dims))(*inputs)

        try:
            with torch.no_grad(), size_oblivious(use_duck_shape=False), program.fake_mode, preserve_node_meta():
                traced = make_fx(all_examples)(*fakes)
        except Exception as error:
            first = first_line(error, "")
            raise ZOCaptureError(
                f"this model cannot give each example a direction of its own ({type(error).__name__}: {first[:200]})"
            ) from error
        if any(b and not _varies(value) for b, value in zip(batch, fakes, strict=True)):
            raise ZOCaptureError(_FIXED)
        names = [n.name for n in traced.graph.find_nodes(op="placeholder")]
        program.inputs = [type(g)(n, g.kind, g.target) for g, n in zip(program.inputs, names, strict=True)]
        for node in traced.graph.find_nodes(op="call_function", target=torch.ops.zowrap.attention.default):
            *tensors, causal, scale, grouped = node.args
            node.target = torch.ops.aten.scaled_dot_product_attention.default
            node.args, node.kwargs = (*tensors, 0.0, causal), {"scale": scale, "enable_gqa": grouped}
        for stand_in in custom_op.with_trait("plain_form"):
            for node in traced.graph.find_nodes(op="call_function", target=stand_in.overload):
                node.target = stand_in.traits.plain_form
        program.graph_module = traced
        return f"{sum(batch)} inputs per example"

    def ensures(self, program: Program) -> None:
        if any(n.op == "get_attr" for n in program.graph.nodes):
            raise ZOInternalError("a tensor was baked into the program")

    def _rows(self, program: Program) -> Any:
        # The sizes of unused inputs are separate symbols.
        placeholders = zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
        named = {given.target: n.meta["val"] for given, n in placeholders if given.kind == "batch" and n.users}
        tensors = [v for v in (named.get("labels"), *named.values()) if isinstance(v, torch.Tensor) and v.ndim]
        if not tensors:
            raise ZOCaptureError("the batch has no tensor with a row for each example")
        return tensors[0].shape[0]

    def _per_example(self, program: Program, value: torch.Tensor, rows: Any) -> torch.Tensor:
        with program.fake_mode:
            return torch.empty((rows, *value.shape), dtype=value.dtype, device=value.device)


_FIXED = "recording it for each example would fix the size of its batches"


class _Mapped(fx.Interpreter):
    """Runs a graph under vmap, replacing operators that vmap cannot handle with varying sizes."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.sym_size.int:
            return args[0].shape[args[1]]
        if target is torch.ops.aten.view.default:  # one example's values need not be contiguous even if all are
            return args[0].reshape(args[1])
        if target is torch.ops.aten.layer_norm.default:
            return _layer_norm(*args[:5])
        if target is torch.ops.aten.linear.default:
            product = torch.matmul(args[0], args[1].t())
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if target is torch.ops.aten.scaled_dot_product_attention.default:
            return _attention(*args, **kwargs)
        if target is torch.ops.aten.cross_entropy_loss.default and not args[1].is_floating_point():
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        if target is torch.ops.aten.gather.default:
            return torch.ops.zowrap.gather(*args[:3])
        if target is torch.ops.aten.cat.default:
            return torch.ops.zowrap.cat(args[0], args[1] if len(args) > 1 else 0)
        return super().call_function(target, args, kwargs)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if mask is not None:  # only the batch dimension is expanded: heads and queries may stay broadcast
        mask = mask.expand(query.shape[0], *mask.shape[1:])
    return torch.ops.zowrap.attention(query, key, value, mask, causal, scale, enable_gqa)


def _cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignored: int = -100,
    smoothing: float = 0.0,
) -> torch.Tensor | None:
    """Compute the cross-entropy from a logsumexp; return None for weighted classes and smoothed labels.

    ``reduction`` is 0 for none, 1 for mean, 2 for sum.
    """
    if weight is not None or smoothing or logits.ndim < 2:
        return None
    counted = labels != ignored
    index = torch.where(counted, labels, 0).unsqueeze(1)
    picked = torch.ops.zowrap.gather(logits, 1, index).squeeze(1)
    losses = torch.where(counted, logits.logsumexp(1) - picked, 0.0)
    return (losses, losses.sum() / counted.sum(), losses.sum())[reduction]


def _layer_norm(
    x: torch.Tensor,
    shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    dims = list(range(-len(shape), 0))
    value = at_least_float32(x)
    value = value - value.mean(dims, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(dims, keepdim=True) + eps)
    value = value if weight is None else value * weight
    value = value if bias is None else value + bias
    return value.to(x.dtype)


def _varies(value: torch.Tensor) -> bool:
    """Return whether the number of rows is still a free symbol."""
    size = value.shape[0]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _one_row(value: torch.Tensor) -> bool:
    return isinstance(value.shape[0], int) and value.shape[0] == 1
