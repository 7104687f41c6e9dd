"""Residual credit: what a forward pass yields for an update that draws no noise.

The hidden states of a residual network are a sum, h_L = h_0 + Σ f_l, that every block adds to. Let δ be the derivative
of the loss by a block's contribution f, with the inputs of all blocks held fixed. It needs only what comes after the
stream (the last norm and the head) and the norms on the stream. A matrix W whose product, with inputs x, f is made of,
gets

    G = Σ over tokens of d xᵀ,    d = Jᵀδ

with J the Jacobian of the small map between the product and the stream (a norm, a gate, a scale; often nothing). G is
the exact gradient for the last matrix that writes to the stream. For lower ones it leaves out what later blocks do with
the contribution, so it is biased, the more the lower the block. Therefore the block at the k-th of L sums takes the
share k/L of its credit: measured on four tasks, that is much better where no norms stand on the stream (the story
model), and makes no difference where they do (docs/fewer-forwards.md).

G of a step is a matrix of rank tokens at most and is never formed whole: a forward yields ``x`` and ``d``, and the
update multiplies them in chunks. In the terms of an update rule it is one direction with its projected gradient,

    z = G / rms(G),    g = rms(G)

with the root mean square over every element that moves. rms(G) is estimated from sketches Y = G r with random signs r,
because E‖G r‖² = ‖G‖²: :data:`SKETCHES` columns cost little beside the forward, and G would have to be formed twice.
Experts share a sketch, in which the tokens of each have random signs as well: products of two vanish in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from zowrap.loss.module import Batch
from zowrap.numerics import noise

# Columns r of a sketch. The relative error of ‖G‖² is √(2/16) for one matrix of rank 1 and falls with the number of
# matrices and their ranks: 10 % for the twelve of a model of six blocks. It only scales a step, and rules that
# normalise average it over steps.
SKETCHES = 16


NO_REPLAY = (
    "residual credit is made of a batch and not of noise, so its steps are repeated with the data, and not from losses "
    "or a journal"
)


@dataclass(frozen=True)
class Use:
    """One place of a program where a parameter that moves gets credit.

    Attributes:
        parameter: its index in the job.
        outputs: positions among the program's outputs: x, d and the sketch for a matrix, then the number of each
            token's expert where there are experts; the gradient for a vector.
        transposed: the parameter is stored as ``[inputs, outputs]``.
        expert: the expert that a matrix belongs to; None where a parameter holds those of all experts,
            ``[experts, outputs, inputs]``, and where there are none.
        share: what the credit is multiplied by, k/L for the k-th of L sums of the stream and 1 after it.
    """

    parameter: int
    outputs: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None
    share: float = 1.0

    @property
    def matrix(self) -> bool:
        return len(self.outputs) > 1


@dataclass
class Piece:
    """What one use of a parameter got from one micro-batch.

    It is of sums of losses, not yet divided by the weight, and whole: the use has yet to take its share.

    Attributes:
        x, d: ``[tokens, inputs]`` and ``[tokens, outputs]`` of a matrix; ``x`` is None until a second forward makes it.
        sketch: float32 ``[outputs, SKETCHES]`` of a matrix; of the matrices of several experts, one for all.
        experts: int64 ``[tokens]``, the number of each token's expert.
        vector: float32 gradient of a vector.
    """

    use: Use
    x: Tensor | None = None
    d: Tensor | None = None
    sketch: Tensor | None = None
    vector: Tensor | None = None
    experts: Tensor | None = None

    def flat(self) -> tuple[Tensor, Tensor]:
        """``x`` and ``d`` with one row for each token, those of the piece's own expert."""
        assert self.x is not None and self.d is not None
        x, d = self.x.reshape(-1, self.x.shape[-1]), self.d.reshape(-1, self.d.shape[-1])
        if self.experts is None or self.use.expert is None:
            return x, d
        own = (self.experts == self.use.expert).nonzero().squeeze(1)
        return x.index_select(0, own), d.index_select(0, own)


@dataclass
class Credit:
    """What the micro-batches of a step yielded.

    Attributes:
        pieces: of one micro-batch after another.
        pending: those micro-batches whose pieces lack their inputs, each with its pieces.
    """

    pieces: list[Piece] = field(default_factory=list)
    pending: list[tuple[Batch, list[Piece]]] = field(default_factory=list)

    def add(self, batch: Batch, pieces: list[Piece]) -> None:
        """Take in one micro-batch."""
        self.pieces += pieces
        if any(piece.use.matrix and piece.x is None for piece in pieces):
            self.pending.append((batch, pieces))

    def of(self, parameter: int) -> list[Piece]:
        """The pieces of one parameter, in order."""
        return [piece for piece in self.pieces if piece.use.parameter == parameter]

    @property
    def parameters(self) -> list[int]:
        """The parameters that got any, in order of their indices."""
        return sorted({piece.use.parameter for piece in self.pieces})

    def squared_norm(self) -> Tensor:
        """‖G‖², 0-d float64: exact for vectors, estimated from the sketches for matrices."""
        total: Tensor = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters:
            pieces = self.of(parameter)
            sketches = [piece.use.share * piece.sketch.double() for piece in pieces if piece.sketch is not None]
            vectors = [piece.use.share * piece.vector.double() for piece in pieces if piece.vector is not None]
            if sketches:
                # A parameter may be stored either way, but all its uses see it alike.
                total = total.to(sketches[0].device) + sum(sketches[1:], sketches[0]).square().sum() / SKETCHES
            if vectors:
                total = total.to(vectors[0].device) + sum(vectors[1:], vectors[0]).square().sum()
        return total


def each_expert(pieces: Sequence[Piece], count: int) -> Iterator[list[Piece]]:
    """The pieces of one expert after another, of a parameter that holds the matrices of all."""
    for expert in range(count):
        yield [replace(piece, use=replace(piece.use, expert=expert)) for piece in pieces]


def has_experts(pieces: Sequence[Piece]) -> bool:
    """Whether the parameter of these pieces holds the matrices of all experts."""
    return pieces[0].experts is not None and pieces[0].use.expert is None


def gradient(pieces: Sequence[Piece], factor: Tensor, shape: Sequence[int]) -> Tensor:
    """``factor`` · G of one parameter, whole: float32 of its shape. For the reference; the product never forms it."""
    if has_experts(pieces):
        return torch.stack([gradient(own, factor, shape[1:]) for own in each_expert(pieces, shape[0])])
    left, right = factors(pieces, factor)
    return (left if right is None else left @ right.t()).reshape(shape)


def draw_sketch(inputs: int, seed: int, step: int | Tensor, device: torch.device) -> Tensor:
    """Draw random signs float32 ``[inputs, SKETCHES]``, the same for every parameter of a step."""
    owner = torch.zeros(1, dtype=torch.int64, device=device)
    key = noise.derive_keys(seed, step, 0, owner, noise.TAG_SKETCH)[0]
    return noise.draw("rademacher", key, torch.Size((inputs, SKETCHES)))


def factors(pieces: Sequence[Piece], factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return factors of ``factor`` · G of one parameter: ``[rows, tokens]`` and ``[columns, tokens]``, in float32.

    For a vector they are ``[elements, 1]`` and None. Tokens that the loss does not depend on are left out.
    """
    if not pieces[0].use.matrix:
        vectors = [piece.use.share * piece.vector for piece in pieces if piece.vector is not None]
        return (factor * sum(vectors[1:], vectors[0])).reshape(-1, 1), None
    lefts, rights = [], []
    for piece in pieces:
        x, d = piece.flat()
        if x.device.type == "cpu":  # on a GPU, counting them would wait for it
            kept = (d != 0).any(1)
            if 2 * int(kept.sum()) < kept.numel():
                index = kept.nonzero().squeeze(1)
                x, d = x.index_select(0, index), d.index_select(0, index)
        d = d.float() * (factor * piece.use.share)
        left, right = (x.float(), d) if piece.use.transposed else (d, x.float())
        lefts.append(left)
        rights.append(right)
    left, right = (t[0] if len(t) == 1 else torch.cat(t) for t in (lefts, rights))
    return left.t(), right.t()
