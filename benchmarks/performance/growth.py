"""Measure how a step grows with parameters, tokens, queries and blocks, varying one at a time from a middle case.

Every case is timed against plain compiled forwards of the same model and batch, two for each query. A term that grew
faster than the forwards do would show as a ratio that rises along its axis.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch

import zowrap
from zowrap.bench import architectures, contenders, measure

# Widths of the model: 2.4, 7.9 and 28.4 million parameters, ×1, ×3.3 and ×12. Doubling the width does not quadruple
# them, for the embeddings only double. The middle case is the second.
WIDTHS = (128, 256, 512)
LAYERS, VOCABULARY = 8, 4096
TOKENS = ((1, 64), (8, 64), (8, 256), (8, 1024))
QUERIES = (1, 4, 16)
BLOCKS = (1, 4, 8)
WIDTH, BATCH = 256, (8, 64)


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(axis, value, arguments of :func:`measure_one`) of every case."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    found += [("parameters", str(width), {"width": width}) for width in WIDTHS]
    found += [("tokens", str(rows * length), {"batch": (rows, length)}) for rows, length in TOKENS]
    found += [("queries", str(q), {"queries": q}) for q in QUERIES]
    found += [("blocks", str(n), {"blocks": n}) for n in BLOCKS]
    return found


def measure_one(
    rounds: int,
    width: int = WIDTH,
    batch: tuple[int, int] = BATCH,
    queries: int = 1,
    blocks: int | None = None,
) -> dict[str, Any]:
    """Measure one case: parameters, tokens, seconds of a step and its ratio to ``2 · queries`` forwards."""
    model = _model(width)
    inputs = architectures.make_batch(model, *batch)
    plain = contenders.make_contender(contenders.YARDSTICK, model, inputs)
    zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-7, engine="compiled", queries=queries, blocks=_blocks(blocks))
    sweep = len(zm.inspect().blocks)
    for _ in range(2 * sweep):
        zm.step(**inputs)
    step = contenders.Contender("step", functools.partial(_sweep, zm, inputs, sweep), per_call=sweep)
    times = measure.time_interleaved([plain, step], rounds)
    seconds, ratios = zip(*times["step"], strict=True)
    ratios = tuple(r / queries for r in ratios)
    count = sum(p.numel() for p in model.parameters())
    facts = {"parameters": count, "tokens": batch[0] * batch[1], "queries": queries, "blocks": sweep}
    return {**facts, "seconds": measure.summarise_spread(seconds), "ratio": measure.summarise_spread(ratios)}


def _sweep(zm: zowrap.ZOModel, inputs: dict[str, torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        zm.step(**inputs)


def _model(width: int) -> torch.nn.Module:
    name = f"growth-{width}"
    sizes = architectures._opt(width, LAYERS, 4, vocabulary=VOCABULARY)
    architectures.ARCHITECTURES.setdefault(name, sizes)
    return architectures.build_model(name)


def _blocks(count: int | None) -> list[str] | None:
    """Divide the layers into ``count`` blocks of neighbours; with more than one, everything else is frozen."""
    if count is None:
        return None
    size = LAYERS // count
    runs = [range(i * size, (i + 1) * size) for i in range(count)]
    return [r"layers\.(" + "|".join(map(str, run)) + r")\." for run in runs] if count > 1 else ["*"]


def run(rounds: int) -> dict[str, Any]:
    """Measure all cases."""
    rows = []
    for axis, value, options in cases():
        rows.append({"axis": axis, "value": value, **measure_one(rounds, **options)})
        print(axis, value, rows[-1]["ratio"], flush=True)
        gc.collect()
    return {"machine": measure.describe_machine(), "rounds": rounds, "rows": rows}
