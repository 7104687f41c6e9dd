"""Draw a step's program as one self-contained HTML page, with a lane for each layer and a column for each point.

Colours distinguish nodes shared by all points, nodes of each point, operators that draw noise for all points at once,
and the epilogue. Neighbouring layers that compute the same share one lane.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor, fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap import custom_op
from zowrap.analysis.program import ProgramCost
from zowrap.analysis.region import Analysis
from zowrap.compiler.program import Program
from zowrap.compiler.regions import Region, layer_of
from zowrap.machine import format_bytes

SHARED, ALL = "shared", "all"


def page(title: str, cost: ProgramCost, facts: Sequence[str]) -> str:
    """Return the page as text.

    Args:
        cost: cost of a step's program for a batch, from :meth:`zowrap.analysis.costs.CostModel.program_cost`.
        facts: lines for the head of the page.
    """
    points = cost.program.points
    columns = [SHARED, *(f"point {p}" for p in range(points))]
    kinds = points_of(cost.program)
    placeholders = cost.program.graph.find_nodes(op="placeholder")
    weights = {n for n, given in zip(placeholders, cost.program.inputs, strict=True) if given.kind == "parameter"}
    legend = [(SHARED, "shared"), (ALL, "noise, for all points at once")]
    legend += [(f"s{p}", f"point {p}") for p in range(points)] + [("weight", "weights"), ("update", "epilogue")]
    body = [
        f"<h1>{escape(title)}</h1>",
        "<pre>" + escape("\n".join(facts)) + "</pre>",
        "<p class=legend>" + " ".join(f"<span class='{kind}'>{text}</span>" for kind, text in legend) + "</p>",
    ]
    for same in _lanes(cost.regions):
        body += _lane(same, kinds, columns, weights)
    if cost.program.epilogue is not None:
        body += _epilogue(cost.program.epilogue.graph)
    colours = "".join(f".s{p}{{background:hsl({_HUES[p % len(_HUES)]} 75% 82%)}}" for p in range(points))
    return _PAGE.format(title=escape(title), style=_STYLE + colours, body="\n".join(body))


def points_of(program: Program) -> dict[fx.Node, str]:
    """Return ``"shared"``, ``"s<point>"`` or ``"all"`` for every computed node."""
    # The placeholder is not looked up by its node's name, because passes that record the program again change it.
    points, coefficients = program.points, program.placeholder("added", "coefficients")
    reached: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        before = node.all_input_nodes
        if _serves_all_points(node):
            reached[node] = frozenset(range(points))
        elif node.target is operator.getitem and _serves_all_points(before[0]):
            reached[node] = frozenset({node.args[1]})
        elif node.target is torch.ops.aten.select.int and before[0] is coefficients:
            reached[node] = frozenset({node.args[2]})
        else:
            reached[node] = frozenset().union(*(reached.get(n, frozenset()) for n in before))
    return {
        node: SHARED if not found else f"s{min(found)}" if len(found) == 1 and not _serves_all_points(node) else ALL
        for node, found in reached.items()
    }


def _serves_all_points(node: fx.Node) -> bool:
    called = custom_op.find(node.target)
    return called is not None and called.traits.all_points


def _lanes(regions: Sequence[tuple[Region, Analysis]]) -> Iterator[list[tuple[Region, Analysis]]]:
    """Yield runs of neighbouring regions that compute the same."""
    for _, same in itertools.groupby(regions, key=lambda each: id(each[1])):
        yield list(same)


def _lane(
    same: list[tuple[Region, Analysis]], kinds: dict[fx.Node, str], columns: list[str], weights: set[fx.Node]
) -> list[str]:
    region, analysis = same[0]
    name = _layer_name(region.nodes)
    times = f" and {len(same) - 1} more like it" if len(same) > 1 else ""
    work = analysis.work
    moved, held = format_bytes(work.bytes), format_bytes(analysis.peak)
    told = f"{len(region.nodes)} nodes, {work.flops:.3g} FLOPs, {moved} moved, {held} held"
    counts = {kind: 0 for kind in [SHARED, ALL, *(f"s{p}" for p in range(len(columns) - 1))]}
    for node in region.nodes:
        counts[kinds[node]] += 1
    bar = "".join(
        f"<span class='{kind}' style='flex:{count}' title='{count} nodes'></span>"
        for kind, count in counts.items()
        if count
    )
    lines = [
        "<section>",
        f"<h2>{escape(name)}{times}</h2><p>{told}{' (each)' if times else ''}</p><div class=bar>{bar}</div>",
        "<details><summary>nodes</summary>",
        f"<p>{' '.join(_chip(n, 'weight') for n in region.inputs if n in weights)}</p>",
        f"<div class=grid style='grid-template-columns:repeat({len(columns)},minmax(0,1fr))'>",
        *(f"<b>{column}</b>" for column in columns),
    ]
    for i, node in enumerate(region.nodes):
        if node.target is operator.getitem:
            continue  # selects one of several results; the node that reads it names it
        kind = kinds[node]
        place = "2 / -1" if kind == ALL else "1" if kind == SHARED else str(int(kind[1:]) + 2)
        lines.append(f"<div style='grid-column:{place}'>{_chip(node, kind, analysis, i)}</div>")
    return [*lines, "</div></details></section>"]


def _layer_name(nodes: Sequence[fx.Node]) -> str:
    """Return the name of the layer that a region's nodes come from."""
    layers = [name for node in nodes if (name := layer_of(node)) is not None]
    first = (
        max(set(layers), key=layers.count, default="outside of layers")
        .removeprefix("L['self'].")
        .removeprefix("model.")
    )
    return first if len(set(layers)) < 2 else f"{len(set(layers))} layers in one"


def _chip(node: fx.Node, kind: str, analysis: Analysis | None = None, position: int = -1) -> str:
    value = node.meta.get("val")
    shape = f" {list(value.shape)}" if isinstance(value, Tensor) else ""
    stored = " stored" if analysis is not None and position in analysis.stored else ""
    flops = analysis.flops.get(position) if analysis is not None else None
    title = f"{node.target}{shape}" + (f", {flops:.3g} FLOPs" if flops else "") + (", in memory" if stored else "")
    reads = ", ".join(n.name for n in node.all_input_nodes)
    text = f"{escape(node.name)}<i>{escape(reads)}</i>"
    return f"<span class='{kind}{stored}' title='{escape(title, quote=True)}'>{text}</span>"


def _epilogue(graph: fx.Graph) -> list[str]:
    updates = [n for n in graph.nodes if n.op == "call_function" and n.users == {} and n.args]
    chips = " ".join(
        f"<span class=update title='{escape(str(n.target))}'>{escape(str(n.args[0]))}</span>" for n in updates
    )
    return [
        "<section><h2>epilogue</h2>",
        f"<p>{len(updates)} fused updates: noise, rule and write of each weight in one loop</p>",
        f"<details><summary>updates</summary><p>{chips}</p></details></section>",
    ]


_HUES = (210, 30, 280, 130, 0, 180, 60, 320)
_STYLE = """
body{font:14px system-ui,sans-serif;margin:2em auto;max-width:75em;color:#222}
h2{font-size:1em;margin:.8em 0 0} section p,details{margin:.2em 0}
.legend span,.grid span,details p span{padding:.1em .5em;border-radius:.3em;display:inline-block;margin:1px}
.grid{display:grid;gap:1px 1em} .grid i{display:block;font-size:.75em;color:#555;overflow-wrap:anywhere}
.bar{display:flex;height:.8em;border-radius:.3em;overflow:hidden}
.shared{background:#d5d5d5} .all{background:#f3d35c} .weight{background:#cfe8cf} .weight i{display:none}
.update{background:#f2a59b} .stored{border-left:4px solid #555}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
