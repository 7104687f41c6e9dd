"""Add a chunk of logits to the running logsumexp of :mod:`zowrap.ops.head`, reading it once and summing in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zowrap.ops.triton import sources

# Logits that one program holds at a time; a token's chunk takes a few iterations.
BLOCK = 1024


# Specialising on the alignment of these pointers gains nothing, and each alignment would compile another kernel.
@triton.jit(do_not_specialize=["labels", "highest", "total", "picked", "first"])
def _add(logits, labels, highest, total, picked, first, classes, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * classes
    lowest: tl.constexpr = -3.0e38
    most, sums = tl.full((BLOCK,), lowest, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < classes
        x = tl.load(row + place, mask=inside, other=lowest).to(tl.float32)
        new = tl.maximum(most, x)
        sums = sums * tl.exp(most - new) + tl.where(inside, tl.exp(x - new), 0.0)
        most = new
    before = tl.load(highest + token)
    after = tl.maximum(before, tl.max(most, axis=0))
    sums = tl.sum(sums * tl.exp(most - after), axis=0)
    tl.store(total + token, tl.load(total + token) * tl.exp(before - after) + sums)
    tl.store(highest + token, after)
    place = tl.load(labels + token) - tl.load(first).to(tl.int64)
    here = (place >= 0) & (place < classes)
    own = tl.load(row + place, mask=here, other=0.0).to(tl.float32)
    tl.store(picked + token, own, mask=here)


def add(logits: Tensor, labels: Tensor, highest: Tensor, total: Tensor, picked: Tensor, first: Tensor) -> None:
    """Add the logits of the classes from ``first`` on for every token; a NaN logit makes ``total`` NaN.

    Args:
        logits: ``[tokens, classes]``, contiguous, any float dtype.
        labels: int64 ``[tokens]``.
        highest: the largest logit so far, float32 ``[tokens]``; updated in place.
        total: the sum of exp(logit − highest) so far, float32 ``[tokens]``; updated in place.
        picked: the logit of each label once its class was seen, float32 ``[tokens]``; updated in place.
        first: int32, its first element is the number of the first class.
    """
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            given = [logits, labels, highest, total, picked, first, logits.shape[1]]
            sources.launch(_add, (logits.shape[0],), *given, BLOCK=BLOCK, num_warps=4)
