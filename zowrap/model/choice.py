"""Choose the engine of a run where that is left open: eager, if compiling takes longer than it saves.

The choice follows from counts alone (steps, noise, modules, tokens), never from a clock: the same run makes it again.
The engines agree to about 1e-6, not bitwise, so it is said, and a run that goes on keeps the engine it began with.

The constants are processor seconds of one core of an Intel Xeon with torch 2.13.0, `step` of both engines in turn:

=======================================  ========  ==========  ==========  ===========  =============
model, batch                             compiles  compiled    eager       draws/step   modules
=======================================  ========  ==========  ==========  ===========  =============
260k-parameter Llama, 5 layers, 16 × 48   36 s      0.030 s     0.060 s       0.8 M         72
the same, LoRA (9k weights move)          41 s      0.030 s     0.050 s       0.03 M       174
OPT, 4 layers of 32 columns, 4 × 16       32 s      0.020 s     0.040 s       0.2 M         52
MiniLM, 10.6M of 22.7M move, 16 × 16      39 s      0.20 s      0.93 s         32 M        122
OPT-125M, 12 layers, 8 × 64               31 s      2.6 s       18.1 s        376 M        140
=======================================  ========  ==========  ==========  ===========  =============

A loaded machine compiles more slowly, but its steps are slower, too. Code that is kept from an earlier start is loaded
in a tenth of that; the choice does not ask for it, or it would differ from start to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zowrap import telling
from zowrap.engines.compile_time import compile_seconds
from zowrap.engines.eager import EagerEngine
from zowrap.loss.module import Batch, count_rows
from zowrap.model.wrapped import Wrapped

# What the eager engine takes longer. It draws each random number in a dozen passes over memory, once for every point
# and once for the update: 22 to 41 ns each, the compiled engine 3 ns.
DRAW_SECONDS = 20e-9
MODULE_SECONDS = 5e-5  # Python of a module and of what it calls, for one evaluation
# Of the forward passes fusion saves 4 to 12 % (docs/performance.md); one core does 60 to 100 Gflop/s of products.
FUSED, FLOPS = 0.05, 60e9
MOST_BYTES = 2**30  # of a perturbed copy, which the eager engine needs: from there on compiling saves memory as well


class Planned(NamedTuple):
    """The work that a run is to do: its steps, and the batches that are evaluated in all of them."""

    steps: int
    batches: int


def settle_engine(zm: Wrapped, batch: Batch, planned: Planned) -> bool:
    """Give ``zm`` the eager engine, and say so, where compiling for ``planned`` costs more than it saves.

    ``batch`` stands for all of them.
    """
    engine, job = zm.engine, zm.job
    open_still = getattr(engine, "fall_back", False) and not getattr(engine, "executables", None)
    if not open_still or job.device.type != "cpu" or job.quant_mode is not None or zm.schedule.asked != "auto":
        return False
    copied = 0 if job.estimator.credit else sum(p.tensor.numel() * p.tensor.element_size() for p in job.parameters)
    takes, saves = compile_seconds(job), saved_seconds(zm, batch, planned)
    if saves >= takes or copied > MOST_BYTES:
        return False
    steps = "step" if planned.steps == 1 else f"{planned.steps} steps"
    telling.say(
        f"running eagerly, because compiling takes {telling.about(takes)} the first time and would save "
        f"{telling.about(saves)} of the {steps}: --engine compiled, or engine='compiled', compiles all the same"
    )
    zm.engine = EagerEngine(job)
    return True


def saved_seconds(zm: Wrapped, batch: Batch, planned: Planned) -> float:
    """Seconds that the planned steps take longer on the eager engine."""
    job, points = zm.job, len(zm.job.points)
    moving = sum(p.tensor.numel() for p in job.parameters) / len(job.blocks)
    examples = count_rows(batch) if zm.job.estimator.per_example else 1  # which the eager engine evaluates one by one
    draws = 0 if job.estimator.credit else moving * (points * examples + job.queries)
    modules = sum(1 for _ in job.loss.model.modules()) * points * examples
    weights = sum(p.numel() for p in job.loss.model.parameters() if p.ndim > 1)
    flops = 2 * weights * _tokens(list(batch.values())) * points
    each = DRAW_SECONDS * draws + MODULE_SECONDS * modules + FUSED * flops / FLOPS
    return planned.batches * each


def _tokens(values: Sequence[object]) -> int:
    """Places of a batch at which a matrix is applied: rows × length of token ids, else rows."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim]
    ids = [v.numel() for v in tensors if v.ndim == 2 and v.dtype in (torch.int64, torch.int32)]
    return max(ids or [v.shape[0] for v in tensors], default=1)
