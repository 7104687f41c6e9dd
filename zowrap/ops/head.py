"""The cross-entropy of a vocabulary head, computed without storing all logits.

A language model's logits, ``[tokens, vocabulary]``, are by far its largest activation, but a forward-only step needs
only one number per row of the batch. These operators process the head in chunks of rows: each chunk's logits are added
to a running logsumexp and discarded. Tokens with an ignored label are skipped.

``head``           product and cross-entropy for a head that is unperturbed or perturbed by low-rank factors
``head_credit``    the same with its derivative by the hidden states, for residual credit
``perturb_head``   the same for w ± εz; each perturbed chunk is made when it is needed, once for all points
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, compile_function
from zowrap.custom_op import Cost, PersistentBuffers, Traits, operator
from zowrap.loss.module import IGNORED
from zowrap.numerics.dtypes import at_least_float32
from zowrap.ops import kernels
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.loops import offset
from zowrap.ops.points import at_point
from zowrap.ops.scratch import buffers, chunks, copied_bytes, longest

_LOWEST = -3.0e38  # below every logit; finite, so that the first chunk computes no inf − inf
_compiled: dict[tuple, Compiled] = {}


def _chunk_rows(w: Tensor, labels: Tensor) -> int:
    """Return the number of head rows in a chunk, if no label is ignored."""
    return longest(w.shape[0], w.shape[1], labels.numel())


def _scratch(x: Sequence[Tensor], w: Tensor, labels: Tensor, changes: int) -> int:
    """Return the bytes that are held in addition to the logits.

    Args:
        changes: how many times a chunk of logits is copied in float32 to add something to it.
    """
    # Each token has a label, and running numbers and a loss at each point.
    numbers = labels.numel() * (labels.element_size() + 20 * len(x))
    return copied_bytes(x) + numbers + changes * 4 * _chunk_rows(w, labels) * labels.numel()


def _logits(w: Tensor, labels: Tensor) -> PersistentBuffers:
    return {("logits", w.dtype, 1): _chunk_rows(w, labels) * labels.numel() * w.element_size()}


def _head_flops(w: Tensor, thin: Tensor | None, labels: Tensor) -> int:
    return 2 * math.prod(labels.shape) * w.shape[0] * (w.shape[1] + (thin.shape[-1] if thin is not None else 0))


def _head_scratch(x: Tensor, w: Tensor, bias: Tensor | None, thin: Tensor | None, labels: Tensor) -> int:
    return _scratch([x], w, labels, (bias is not None) + (thin is not None))


@operator("head", traits=Traits(), cost=Cost(flops=_head_flops, scratch=_head_scratch, buffers=_logits))
def head(x: Tensor, w: Tensor, bias: Tensor | None, thin: Tensor | None, left: Tensor | None, labels: Tensor) -> Tensor:
    """Compute ``token_losses(x · wᵀ + bias + thin · leftᵀ, labels)``.

    Args:
        x: ``[rows, length, inputs]``.
        w: ``[vocabulary, inputs]``.
        bias: ``[vocabulary]``, or ``[rows, vocabulary]`` if it differs between rows.
        thin: float32 ``[rows, length, rank]``.
        left: ``[vocabulary, rank]``, or ``[rows, vocabulary, rank]`` if it differs between rows.
        labels: int64 ``[rows, length]``.

    Returns:
        float32 ``[rows]``.
    """
    own_rows = (left is not None and left.ndim == 3) or (bias is not None and bias.ndim == 2)
    tokens = _Tokens(labels, everything=own_rows)
    inputs, running = tokens.of(x), _Running(tokens.labels)
    factors = None if thin is None else (thin if own_rows else tokens.of(thin))
    for first, last in chunks(w.shape[0], w.shape[1], inputs.shape[0]):
        logits = _product(inputs, w[first:last])
        if factors is not None and left is not None:
            change = factors.reshape(-1, *factors.shape[-2:]) if own_rows else factors
            right = left[..., first:last, :].mT
            wide = at_least_float32(logits)
            logits = (wide + (change @ right).reshape(logits.shape)).to(logits.dtype)
        if bias is not None:
            part = bias[..., first:last]
            if part.ndim == 2:
                logits = (logits.view(*labels.shape, -1) + part.unsqueeze(1)).view_as(logits)
            else:
                logits = logits + part
        running.add(logits, first)
    return tokens.sums(running.losses())


@head.register_fake
def _(x, w, bias, thin, left, labels):
    return x.new_empty(labels.shape[:-1], dtype=torch.float32)


@head.register_vmap
def _(info, in_dims, x, w, bias, thin, left, labels):
    """Map over examples, each with its own factors and bias; all share the head itself."""

    def rows(t: Tensor | None, dim: int | None) -> Tensor | None:
        """Concatenate the examples' rows."""
        if t is None:
            return None
        return (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)

    def own(t: Tensor | None, dim: int | None) -> Tensor | None:
        return t if t is None or dim is None else t.movedim(dim, 0)

    x, thin, labels = rows(x, in_dims[0]), rows(thin, in_dims[3]), rows(labels, in_dims[5])
    bias, left = own(bias, in_dims[2]), own(left, in_dims[4])
    return head(x, w, bias, thin, left, labels).unflatten(0, (info.batch_size, -1)), 0


@operator(
    "head_credit",
    traits=Traits(),
    cost=Cost(
        flops=lambda w, labels: 6 * math.prod(labels.shape) * w.numel(),
        scratch=lambda x, w, bias, labels: _scratch([x], w, labels, 2) + 4 * x.numel(),
        buffers=_logits,
    ),
)
def head_credit(x: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``token_losses(x · wᵀ + bias, labels)`` and its derivative by ``x``, (softmax − one-hot) · w.

    The logits are computed twice, in chunks: for the logsumexp, and again for the derivative.

    Args:
        x: ``[rows, length, inputs]``.
        w: ``[vocabulary, inputs]``.
        bias: ``[vocabulary]``.
        labels: int64 ``[rows, length]``.

    Returns:
        float32 ``[rows]``; and ``x``'s shape and dtype, of each row's own sum.
    """
    tokens = _Tokens(labels)
    inputs, running = tokens.of(x), _Running(tokens.labels)
    runs = list(chunks(w.shape[0], w.shape[1], inputs.shape[0]))

    def logits(first: int, last: int) -> Tensor:
        product = _product(inputs, w[first:last])
        return product if bias is None else product + bias[first:last]

    for first, last in runs:
        running.add(logits(first, last), first)
    losses = running.losses()
    counted = (tokens.labels != IGNORED).unsqueeze(1)
    logsumexp = (running.highest + running.total.log()).unsqueeze(1)
    derivative = torch.zeros(inputs.shape, dtype=torch.float32, device=x.device)
    classes = torch.arange(w.shape[0], device=x.device)
    for first, last in runs:
        wide = (logits(first, last).float() - logsumexp).exp_()
        wide.sub_((classes[first:last] == tokens.labels.unsqueeze(1)).float()).mul_(counted)
        part = torch.mm(wide.to(w.dtype), w[first:last])
        derivative += part
    return tokens.sums(losses), tokens.spread(derivative.to(x.dtype)).view(x.shape)


@head_credit.register_fake
def _(x, w, bias, labels):
    return x.new_empty(labels.shape[:-1], dtype=torch.float32), x.new_empty(x.shape)


def _perturbed_flops(w: Tensor, coefficients: Tensor, labels: Tensor) -> int:
    return 2 * coefficients.shape[0] * math.prod(labels.shape) * w.shape[0] * w.shape[1]


def _perturbed_scratch(x: list[Tensor], w: Tensor, bias: list[Tensor], labels: Tensor) -> int:
    return _scratch(x, w, labels, min(len(bias), 1))


def _perturbed_buffers(w: Tensor, coefficients: Tensor, labels: Tensor) -> PersistentBuffers:
    points = coefficients.shape[0]
    weights = points * _chunk_rows(w, labels) * w.shape[1] * w.element_size()
    return {**_logits(w, labels), ("weights", w.dtype, points): weights}


@operator(
    "perturb_head",
    traits=Traits(all_points=True),
    cost=Cost(
        flops=_perturbed_flops,
        noise=lambda w: w.numel(),
        scratch=_perturbed_scratch,
        buffers=_perturbed_buffers,
    ),
)
def perturb_head(
    x: list[Tensor],
    w: Tensor,
    bias: list[Tensor],
    slots: list[Tensor],
    key: Tensor,
    scale: Tensor,
    scalars: list[Tensor],
    coefficients: Tensor,
    labels: Tensor,
    kernel_key: str,
) -> list[Tensor]:
    """Compute ``[token_losses(x[p] · (w + coefficients[p] · z)ᵀ + bias[p], labels) for p]``, float32 ``[rows]`` each.

    Args:
        x: ``[rows, length, inputs]`` for each point, or a single tensor that all points share.
        bias: ``[vocabulary]`` for each point, a single one that all points share, or none.
    """
    tokens = _Tokens(labels)
    inputs = [tokens.of(t) for t in x]
    running = [_Running(tokens.labels) for _ in range(coefficients.shape[0])]
    noise, perturbation = NoiseArgs(slots, key, scale, scalars), kernels.get(kernel_key).perturbation
    runs = chunks(w.shape[0], w.shape[1], inputs[0].shape[0])
    for first, last, weights in perturbation.chunks(w, noise, coefficients, runs):
        for p, weight in enumerate(weights):
            logits = _product(at_point(inputs, p), weight)
            running[p].add(logits + at_point(bias, p)[first:last] if bias else logits, first)
    return [tokens.sums(r.losses()) for r in running]


@perturb_head.register_fake
def _(x, w, bias, slots, key, scale, scalars, coefficients, labels, kernel_key):
    return [x[0].new_empty(labels.shape[:-1], dtype=torch.float32) for _ in range(coefficients.shape[0])]


def _product(x: Tensor, w: Tensor) -> Tensor:
    """Compute ``x · wᵀ`` in a scratch buffer that the next product overwrites.

    All points use the same buffer, so it stays in the cache.
    """
    size = x.shape[0] * w.shape[0]
    out = buffers("logits", w.dtype, w.device, 1, size)[0][:size].view(x.shape[0], w.shape[0])
    return torch.mm(x, w.t(), out=out)


class _Tokens:
    """The tokens without an ignored label, flattened.

    Args:
        everything: keep ignored tokens too. On a GPU they are always kept, because finding them would wait for it.
    """

    def __init__(self, labels: Tensor, everything: bool = False) -> None:
        self.shape = labels.shape
        # The kernels are compiled for contiguous int64; labels of rows with one token may be a view with gaps.
        flat = labels.reshape(-1).to(torch.int64).contiguous()
        counted = flat != IGNORED
        self.index = None
        if not everything and labels.device.type == "cpu" and not bool(counted.all()):
            self.index = counted.nonzero().squeeze(-1)
        self.labels = flat if self.index is None else flat[self.index]

    def of(self, x: Tensor) -> Tensor:
        """Select the tokens of ``[rows, length, features]``, as ``[tokens, features]``."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index)

    def spread(self, values: Tensor) -> Tensor:
        """Put ``[tokens, features]`` in their places, with zeros where a label is ignored."""
        if self.index is None:
            return values
        return values.new_zeros(self.shape.numel(), values.shape[1]).index_copy_(0, self.index, values)

    def sums(self, losses: Tensor) -> Tensor:
        """Sum one loss per token to float32 ``[rows]``."""
        if self.index is not None:
            losses = losses.new_zeros(self.shape.numel()).index_copy_(0, self.index, losses)
        return losses.view(self.shape).sum(-1)


class _Running:
    """The running logsumexp over the vocabulary, and the logit of each token's label once its class was seen."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.highest = torch.full(labels.shape, _LOWEST, dtype=torch.float32, device=labels.device)
        self.total = torch.zeros_like(self.highest)
        self.picked = torch.full_like(self.highest, torch.nan)  # stays NaN if the label is not a class

    def add(self, logits: Tensor, first: int) -> None:
        """Add the ``logits`` of the classes from ``first`` on, ``[tokens, classes]``."""
        key = (logits.dtype, logits.device)
        tensors = [logits, self.labels, self.highest, self.total, self.picked]
        start = offset(first, logits.device)
        if logits.is_cuda:
            from zowrap.ops.triton import cross_entropy

            return cross_entropy.add(logits, self.labels, self.highest, self.total, self.picked, start)
        if key not in _compiled:
            sizes: Sequence[tuple[int, ...]] = ((64, 96), (64,), (64,), (64,), (64,))
            examples = [t.new_zeros(size) for t, size in zip(tensors, sizes, strict=True)]
            _compiled[key] = compile_function(_add, [*examples, start], range(5))
        _compiled[key](*tensors, start)
        return None

    def losses(self) -> Tensor:
        """Return float32 losses, one per token; 0 where the label is ignored."""
        losses = self.highest + self.total.log() - self.picked
        return torch.where(self.labels == IGNORED, 0.0, losses)


def _add(logits: Tensor, labels: Tensor, highest: Tensor, total: Tensor, picked: Tensor, first: Tensor) -> tuple:
    logits = logits.float()
    new = torch.maximum(highest, logits.amax(1))
    total.copy_(total * (highest - new).exp() + (logits - new.unsqueeze(1)).exp().sum(1))
    highest.copy_(new)
    place = labels - first[0]
    here = (place >= 0) & (place < logits.shape[1])
    own = logits.gather(1, place.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    picked.copy_(torch.where(here, own, picked))
    return ()
