"""Replace each tunable weight of the active block by ``perturb(weight, key, coefficients)``.

    before                       after
    y = linear(x, w, b)          key = select(keys, 0, 17)
                                 theta = zowrap.perturb(w, [], key, scale, [], coefficients, kernel_key)
                                 y = linear(x, theta[0], b)

With low-rank directions the noise is a single input, ``factors``, and each weight uses its own part of it:

    left = factors[a : b].view(rows, rank);  right = factors[b : c].view(columns, rank)
    theta = zowrap.perturb_lowrank(w, left, right, coefficients)

A tied weight is one parameter: every placeholder of its storage is replaced by the same ``theta``. A tied embedding and
head are thus perturbed along one direction and receive one update.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError
from zowrap.passes.manager import Pass
from zowrap.step.job import Job


class UnusedBlock(ZOCaptureError):
    """The loss does not depend on any parameter of the active block."""


class SelectTunable(Pass):
    """Perturb the tunable weights of one block; see the module docstring.

    Args:
        block: index of the active block.
        kernel_key: names the kernels (:mod:`zowrap.ops.kernels`).
        points: number of evaluations in the finished program.
        scalar_names: names of the scalars that the rule's direction reads.
    """

    name = "select_tunable"

    def __init__(self, job: Job, block: int, kernel_key: str, points: int, scalar_names: list[str]) -> None:
        self.job, self.block, self.kernel_key, self.points = job, block, kernel_key, points
        self.scalar_names = scalar_names

    def call(self, program: Program) -> str:
        job, graph = self.job, program.graph
        device = job.device
        if job.layouts:
            size = job.layouts[self.block].size
            noise = [program.add_input("factors", torch.zeros(size, device=device))]
        else:
            noise = [
                program.add_input("keys", torch.zeros(len(job.parameters), 2, dtype=torch.int32, device=device)),
                program.add_input("scale", torch.ones((), device=device)),
            ]
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
            if job.layouts:
                theta = self._along_factors(program, i, uses[0], noise[0], coefficients)
            else:
                theta = self._along_noise(program, i, uses[0], noise, scalars, coefficients)
            with graph.inserting_after(theta):
                value = graph.call_function(operator.getitem, (theta, 0))
            for use in uses:
                for user in [u for u in use.users if u is not theta]:
                    user.replace_input_with(use, value)
            theta.meta["parameter"] = i
        if not used:
            raise UnusedBlock(
                f"none of the tunable parameters of block {job.blocks[self.block].name!r} takes part in the loss"
            )
        return f"{used} of {len(job.blocks[self.block].indices)} tunable parameters take part in the loss"

    def _along_noise(
        self,
        program: Program,
        index: int,
        weight: fx.Node,
        noise: list[fx.Node],
        scalars: list[fx.Node],
        coefficients: fx.Node,
    ) -> fx.Node:
        job, graph = self.job, program.graph
        keys, scale = noise
        own = {name: program.add_input(f"slot/{name}/{index}", job.slots[name][index]) for name in job.reads}
        slots = [own[name] for name in job.reads if job.rule.slots[name].kind == "element"]
        numbers = scalars + [own[name] for name in job.reads if job.rule.slots[name].kind == "parameter"]
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            key = graph.call_function(torch.ops.aten.select.int, (keys, 0, index))
        with graph.inserting_after(key):
            return graph.call_function(
                torch.ops.zowrap.perturb_codes.default
                if job.parameters[index].codes
                else torch.ops.zowrap.perturb.default,
                (weight, slots, key, scale, numbers, coefficients, self.kernel_key),
                name=f"theta_{index}",
            )

    def _along_factors(
        self, program: Program, index: int, weight: fx.Node, factors: fx.Node, coefficients: fx.Node
    ) -> fx.Node:
        graph, place = program.graph, self.job.layouts[self.block].places[index]
        nodes: list[fx.Node] = []
        after = graph.find_nodes(op="placeholder")[-1]
        parts = [(place.left, place.rows)] + ([] if place.right is None else [(place.right, place.columns)])
        for start, length in parts:
            for target, args in (
                (torch.ops.aten.slice.Tensor, (factors, 0, start, start + length * place.rank)),
                (torch.ops.aten.view.default, (None, [length, place.rank])),
            ):
                with graph.inserting_after(after):
                    after = graph.call_function(target, (args[0] or after, *args[1:]))
            nodes.append(after)
        right = nodes[1] if len(nodes) > 1 else None
        with graph.inserting_after(after):
            return graph.call_function(
                torch.ops.zowrap.perturb_lowrank.default,
                (weight, nodes[0], right, coefficients),
                name=f"theta_{index}",
            )
