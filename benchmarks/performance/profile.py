"""Profile a step and two plain forwards with torch's profiler: seconds by kind of work.

Steps and forwards take turns, so that a slow minute of the machine slows both; each figure is a median over the rounds.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from zowrap.bench import architectures, contenders, measure

SIZES = ((8, 64), (8, 256))
PRODUCTS, HEAD, ATTENTION = "products with matrices", "products with the head", "attention"
PERTURBATION, UPDATE, REST = "perturbations", "update", "all else"
LOOPS = "loops of the head (perturbation, logsumexp)"
KINDS = (PRODUCTS, HEAD, ATTENTION, PERTURBATION, LOOPS, UPDATE, REST)


def run(rounds: int) -> dict[str, Any]:
    """Profile both batch sizes of OPT-125M, with gaussian directions."""
    model = architectures.build_model("opt-125m")
    found = []
    for batch, length in SIZES:
        inputs = architectures.make_batch(model, batch, length)
        both = [contenders.make_contender(name, model, inputs) for name in (contenders.YARDSTICK, "gaussian")]
        for contender in both:
            contender.step()
        times: dict[str, list[Counter[str]]] = {contender.name: [] for contender in both}
        for _ in range(rounds):
            for contender in both:
                times[contender.name].append(by_kind(contender.step))
        for name, rows in times.items():
            seconds = {kind: statistics.median(row[kind] for row in rows) for kind in KINDS}
            found.append({"tokens": batch * length, "row": name, "seconds": seconds})
    return {"machine": measure.describe_machine(), "rounds": rounds, "profile": found}


def by_kind(step: Callable[[], Any]) -> Counter[str]:
    """Profile one call: seconds by kind of work. The plain head's cross-entropy counts as other work."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    found: Counter[str] = Counter()
    products = []
    for event in recorded.events():
        around = _around(event)
        kind = _kind(event.name, around)
        if kind == PRODUCTS and not around:
            products.append(event.self_cpu_time_total)
        else:
            found[kind] += event.self_cpu_time_total
    # The plain head is one product of each forward, by far the longest; ours is under an operator of its own.
    longest = sorted(products)[-2:] if not found[HEAD] else []
    found[HEAD] += sum(longest)
    found[PRODUCTS] += sum(products) - sum(longest)
    return Counter({kind: microseconds / 1e6 for kind, microseconds in found.items()})


def _around(event: Any) -> str:
    """The operator of this library within which something ran, or nothing."""
    while event is not None:
        if event.name.startswith("zowrap::"):
            return str(event.name)
        event = event.cpu_parent
    return ""


def _kind(name: str, around: str) -> str:
    if name in ("aten::mm", "aten::addmm"):
        return HEAD if "head" in around else PRODUCTS
    if "attention" in name:
        return ATTENTION
    if "update" in around:
        return UPDATE
    if "head" in around:
        return LOOPS
    return PERTURBATION if around else REST
