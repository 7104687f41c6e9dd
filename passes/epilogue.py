"""The update rule, the only place that writes weights.

    losses, keys, state, hyper →
        g = (losses[0] − losses[1]) / 2ε;  v' = …;  coefficients = …;  apply = isfinite(…)
        zowrap.update_(w_0, slots_0, keys[:, 0], …, apply)
        zowrap.update_(w_1, slots_1, keys[:, 1], …, apply)
        return v', coefficients, apply, g, loss

The scalar part is the rule's own function, recorded; each ``update_`` is one fused kernel per parameter: noise
regenerated from its key, rule, rounding and write in one loop. Weights no loss depends on are updated too, exactly as
the eager engine does, so that what moves does not depend on the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.program import Program
from zowrap.errors import ZOInternalError
from zowrap.passes.manager import Pass
from zowrap.step.arithmetic import conclude
from zowrap.step.job import Job

UPDATES = (
    torch.ops.zowrap.update_.default,
    torch.ops.zowrap.update_lowrank_.default,
    torch.ops.zowrap.update_codes_.default,
)


@dataclass
class Epilogue:
    """The second program of a step.

    Attributes:
        graph_module: inputs ``keys…, scales…, scalars…, rounding_keys, coefficients…, lr, eps, weight_decay, apply``,
            then each active parameter followed by its slots, and by its rows' scales where it holds codes; along
            low-rank directions no keys and scales, and the two factors of ĝ after each parameter's slots.
        coefficient_names: order of the rule's coefficients.
    """

    graph_module: fx.GraphModule
    coefficient_names: list[str]


@torch.no_grad()
def coefficient_shapes(job: Job, points: int) -> dict[str, torch.Size]:
    """The rule's coefficients and their shapes, learnt by calling its scalar function once on made-up losses."""
    losses = torch.zeros(points, device=job.device)
    one = torch.ones(job.queries, device=job.device)  # a population is one direction here: its "g" is never passed
    candidates = None
    if job.rule.candidates is not None:
        candidates = torch.zeros_like(job.rule.candidates(one[:1], job.hyper))
    step = torch.zeros((), device=job.device)
    conclusion = conclude(job.rule, lambda *_: one, job.states[0], losses, job.hyper, step, candidates=candidates)
    return {name: value.shape for name, value in conclusion.coefficients.items()}


def build_epilogue(job: Job, block: int, spec: str, names: list[str], scalar_names: list[str]) -> Epilogue:
    """The updates of one block as a program of ``update_`` operators, ``update_lowrank_`` along low-rank directions."""
    graph = fx.Graph()
    lowrank = job.direction.lowrank is not None
    queries = 0 if lowrank else job.queries
    keys = [graph.placeholder(f"keys_{q}") for q in range(queries)]
    scales = [graph.placeholder(f"scale_{q}") for q in range(queries)]
    scalars = [graph.placeholder(f"scalar_{n}") for n in scalar_names]
    rounding_keys = graph.placeholder("rounding_keys")
    names = [name for name in names if not (lowrank and name == "g")]  # ĝ is formed already
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
            graph.call_function(
                torch.ops.zowrap.update_lowrank_.default,
                (w, slots, left, right, rounding_key, coefficients, hyper, apply, decay, spec),
            )
            continue
        own_keys = [graph.call_function(select, (k, 0, i)) for k in keys]
        rounding_key = graph.call_function(select, (rounding_keys, 0, i))
        target, weight = torch.ops.zowrap.update_.default, [w]
        if job.parameters[i].codes:
            target, weight = torch.ops.zowrap.update_codes_.default, [w, graph.placeholder(f"row_scale_{i}")]
        graph.call_function(
            target,
            (*weight, slots, own_keys, scales, [*scalars, *own], rounding_key, coefficients, hyper, apply, decay, spec),
        )
    graph.output(())
    # Placeholders were created where they are needed; a function's arguments come first.
    first = next(iter(graph.nodes))
    for node in list(graph.find_nodes(op="placeholder")):
        if node is not first:
            first.append(node)
            first = node
    graph_module = fx.GraphModule(torch.nn.Module(), graph, class_name="Epilogue")
    _check(job, block, graph)
    return Epilogue(graph_module, names)


def _check(job: Job, block: int, graph: fx.Graph) -> None:
    """Every active parameter is written exactly once, and nothing else is."""
    graph.lint()
    written = [node.args[0] for node in graph.nodes if node.target in UPDATES]
    if [w.name for w in written] != [f"w_{i}" for i in job.blocks[block].indices]:  # type: ignore[union-attr]
        raise ZOInternalError("the epilogue does not write every active parameter exactly once")


class AppendEpilogue(Pass):
    """Attach the epilogue's text to the program, so that ``inspect`` prints the whole step."""

    name = "epilogue"

    def __init__(self, epilogue: Epilogue) -> None:
        self.epilogue = epilogue

    def call(self, program: Program) -> str:
        program.epilogue = self.epilogue.graph_module
        updates = sum(n.target in UPDATES for n in self.epilogue.graph_module.graph.nodes)
        return f"{updates} fused updates"
