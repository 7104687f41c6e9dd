"""Append the update rule, the only place that writes weights.

    losses, keys, state, hyper →
        g = (losses[0] − losses[1]) / 2ε;  v' = …;  coefficients = …;  apply = isfinite(…)
        zowrap.update_(w_0, slots_0, keys[:, 0], …, apply)
        zowrap.update_(w_1, slots_1, keys[:, 1], …, apply)
        return v', coefficients, apply, g, loss

The scalar part is the recorded function of the rule. Each ``update_`` is one fused kernel for one parameter: a single
loop regenerates the noise from its key, applies the rule, rounds and writes. Weights that no loss depends on are
updated too, as in the eager engine, so both engines move the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op
from zowrap.compiler.program import Program
from zowrap.errors import ZOInternalError
from zowrap.ops.codes import update_codes_
from zowrap.ops.update import update_, update_lowrank_
from zowrap.passes.manager import Pass
from zowrap.step.arithmetic import conclude
from zowrap.step.job import Job


@dataclass
class Epilogue:
    """The program that updates the weights at the end of a step.

    Attributes:
        graph_module: takes ``keys…, scales…, scalars…, rounding_keys, coefficients…, lr, eps, weight_decay, apply``,
            then each active parameter followed by its slots and, if it holds codes, by the scales of its rows. With
            low-rank directions there are no keys and scales, and each parameter's slots are followed by the two
            factors of ĝ.
        coefficient_names: the rule's coefficients, in order.
    """

    graph_module: fx.GraphModule
    coefficient_names: list[str]


@torch.no_grad()
def coefficient_shapes(job: Job, points: int) -> dict[str, torch.Size]:
    """Return the rule's coefficients and their shapes, found by calling its scalar function once on dummy losses."""
    losses = torch.zeros(points, device=job.device)
    one = torch.ones(job.queries, device=job.device)  # a population counts as one direction: its "g" is never passed
    candidates = None
    if job.rule.candidates is not None:
        candidates = torch.zeros_like(job.rule.candidates(one[:1], job.hyper))
    step = torch.zeros((), device=job.device)
    conclusion = conclude(job.rule, lambda *_: one, job.states[0], losses, job.hyper, step, candidates=candidates)
    return {name: value.shape for name, value in conclusion.coefficients.items()}


def update_operator(job: Job, index: int) -> custom_op.Operator:
    """Return the operator that writes a parameter's update."""
    if job.direction.lowrank is not None:
        return update_lowrank_
    return update_codes_ if job.parameters[index].codes else update_


def build_epilogue(job: Job, block: int, kernel_key: str, names: list[str], scalar_names: list[str]) -> Epilogue:
    """Build the program that updates one block, with one operator for each parameter (:func:`update_operator`)."""
    graph = fx.Graph()
    lowrank = job.direction.lowrank is not None
    queries = 0 if lowrank else job.queries
    keys = [graph.placeholder(f"keys_{q}") for q in range(queries)]
    scales = [graph.placeholder(f"scale_{q}") for q in range(queries)]
    scalars = [graph.placeholder(f"scalar_{n}") for n in scalar_names]
    rounding_keys = graph.placeholder("rounding_keys")
    names = [name for name in names if not (lowrank and name == "g")]  # ĝ has already been formed
    coefficients = [graph.placeholder(f"coefficient_{n}") for n in names]
    hyper = [graph.placeholder(n) for n in ("lr", "eps", "weight_decay")]
    apply = graph.placeholder("apply")
    select = torch.ops.aten.select.int
    for i in job.blocks[block].indices:
        w = graph.placeholder(f"w_{i}")
        slots = [graph.placeholder(f"slot_{name}_{i}") for name in job.slots_of(i)]
        own = [graph.placeholder(f"slot_{name}_{i}") for name in job.rule.slot_names("parameter")]
        decay = job.decays and job.parameters[i].decays
        if lowrank:
            vector = job.layouts[block].places[i].right is None
            left = graph.placeholder(f"left_{i}")
            right = None if vector else graph.placeholder(f"right_{i}")
            rounding_key = graph.call_function(select, (rounding_keys, 0, i))
            along: tuple[Any, ...] = (left, right, rounding_key)
        else:
            own_keys = [graph.call_function(select, (k, 0, i)) for k in keys]
            rounding_key = graph.call_function(select, (rounding_keys, 0, i))
            along = (own_keys, scales, [*scalars, *own], rounding_key)
        weight = [w, graph.placeholder(f"row_scale_{i}")] if job.parameters[i].codes else [w]
        arguments = (*weight, slots, *along, coefficients, hyper, apply, decay, kernel_key)
        graph.call_function(update_operator(job, i).overload, arguments)
    graph.output(())
    # The placeholders were created where they are used; move them to the front, where a function has its arguments.
    first = next(iter(graph.nodes))
    for node in list(graph.find_nodes(op="placeholder")):
        if node is not first:
            first.append(node)
            first = node
    graph_module = fx.GraphModule(torch.nn.Module(), graph, class_name="Epilogue")
    _check(job, block, graph)
    return Epilogue(graph_module, names)


def _check(job: Job, block: int, graph: fx.Graph) -> None:
    """Check that every active parameter is written exactly once, and nothing else is."""
    graph.lint()
    if [w.name for w in written_weights(graph)] != [f"w_{i}" for i in job.blocks[block].indices]:
        raise ZOInternalError("the epilogue does not write every active parameter exactly once")


def written_weights(graph: fx.Graph) -> list[fx.Node]:
    """Return the weights that a graph writes, in order."""
    found = []
    for node in graph.nodes:
        updates = custom_op.find(node.target)
        if updates is not None and updates.traits.writes is not None:
            found.append(updates.bind(node.args, node.kwargs)[updates.traits.writes])
    return found


class AppendEpilogue(Pass):
    """Attach the epilogue to the program, so that ``inspect`` prints the whole step."""

    name = "epilogue"

    def __init__(self, epilogue: Epilogue) -> None:
        self.epilogue = epilogue

    def call(self, program: Program) -> str:
        program.epilogue = self.epilogue.graph_module
        return f"{len(written_weights(self.epilogue.graph_module.graph))} fused updates"
