"""Each tunable weight of the active block → ``perturb(weight, key, coefficients)``.

    before                       after
    y = linear(x, w, b)          key = select(keys, 0, 17)
                                 theta = zowrap.perturb(w, [], key, scale, [], coefficients, spec)
                                 y = linear(x, theta[0], b)

A tied weight is one parameter: every placeholder that names its storage is replaced by the same ``theta``. Embedding
and head then look along one direction and receive one update.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from zowrap.passes.manager import Pass

from zowrap import operators  # noqa: F401  (registers torch.ops.zowrap)
from zowrap.engines.base import Job
from zowrap.errors import ZOCaptureError
from zowrap.program import Program


class SelectTunable(Pass):
    """See the module.

    Args:
        block: index of the active block.
        spec: names the kernels (:mod:`zowrap.kernels`).
        points: how many evaluations the finished program makes.
        scalar_names: what the rule's direction reads.
    """

    name = "select_tunable"

    def __init__(self, job: Job, block: int, spec: str, points: int, scalar_names: list[str]) -> None:
        self.job, self.block, self.spec, self.points = job, block, spec, points
        self.scalar_names = scalar_names

    def call(self, program: Program) -> str:
        job, graph = self.job, program.graph
        device = job.device
        keys = program.add_input("keys", torch.zeros(len(job.parameters), 2, dtype=torch.int32, device=device))
        scale = program.add_input("scale", torch.ones((), device=device))
        coefficients = program.add_input("coefficients", torch.zeros(self.points, device=device))
        scalars = [program.add_input(f"scalar/{n}", torch.zeros((), device=device)) for n in self.scalar_names]
        used = 0
        for i in job.blocks[self.block].indices:
            parameter = job.parameters[i]
            uses = [
                p for name in parameter.names if (p := program.placeholder("parameter", f"model.{name}")) is not None
            ]
            uses = [p for p in uses if p.users]
            if not uses:
                continue
            used += 1
            slots = [program.add_input(f"slot/{name}/{i}", job.slots[name][i]) for name in job.rule.direction_slots]
            after = graph.find_nodes(op="placeholder")[-1]
            with graph.inserting_after(after):
                key = graph.call_function(torch.ops.aten.select.int, (keys, 0, i))
            with graph.inserting_after(key):
                theta = graph.call_function(
                    torch.ops.zowrap.perturb.default,
                    (uses[0], slots, key, scale, scalars, coefficients, self.spec),
                    name=f"theta_{i}",
                )
            with graph.inserting_after(theta):
                value = graph.call_function(operator.getitem, (theta, 0))
            for use in uses:
                for user in [u for u in use.users if u is not theta]:
                    user.replace_input_with(use, value)
            theta.meta["parameter"] = i
        if not used:
            raise ZOCaptureError(
                f"none of the tunable parameters of block {job.blocks[self.block].name!r} takes part in the loss"
            )
        return f"{used} of {len(job.blocks[self.block].indices)} tunable parameters take part in the loss"


def tunable_values(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that stand for a perturbed weight at some point."""
    return [
        user
        for node in graph.find_nodes(op="call_function", target=torch.ops.zowrap.perturb.default)
        for user in node.users
        if user.target is operator.getitem
    ]
