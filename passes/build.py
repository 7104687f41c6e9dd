"""Run all passes in order."""

from __future__ import annotations

from zowrap.compiler.program import Program
from zowrap.passes.check_lookups import CheckLookups
from zowrap.passes.epilogue import AppendEpilogue, Epilogue
from zowrap.passes.fuse_head import FuseHead
from zowrap.passes.lower_quantized import LowerQuantized
from zowrap.passes.manager import Pass, run
from zowrap.passes.perturb import Perturb
from zowrap.passes.perturb_lowrank import PerturbLowRank
from zowrap.passes.population import Population
from zowrap.passes.residual import AssignCredit
from zowrap.passes.select_tunable import SelectTunable
from zowrap.passes.split_streams import SplitStreams
from zowrap.passes.strip_training import StripTraining
from zowrap.step.job import Job


def build_credit(program: Program, job: Job) -> Program:
    """Turn a captured program into one evaluation at θ that yields residual credit as well."""
    return run(program, [StripTraining(), CheckLookups(), FuseHead(), AssignCredit(job)])


def build(
    program: Program,
    job: Job,
    block: int,
    kernel_key: str,
    points: int,
    scalar_names: list[str],
    epilogue: Epilogue,
    per_example: bool = False,
) -> Program:
    """Turn a captured program into ``points`` evaluations along one direction of one block.

    With ``points`` 0 the program stays the plain loss at θ. With ``per_example`` every example gets its own direction.
    """
    passes: list[Pass] = [StripTraining(), CheckLookups(), FuseHead()]
    if points:
        passes += [SelectTunable(job, block, kernel_key, points, scalar_names), SplitStreams(points)]
        passes += [Perturb() if job.direction.lowrank is None else PerturbLowRank()]
        passes += [LowerQuantized()] if job.quant_mode is not None else []
        passes += [Population()] if per_example else []
        passes += [AppendEpilogue(epilogue)]
    return run(program, passes)
