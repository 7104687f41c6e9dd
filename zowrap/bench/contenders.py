"""Build the contenders of ``zowrap bench step``, each a callable that makes one step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import zowrap
from zowrap import names, rules
from zowrap.compiler import cache
from zowrap.errors import ZOError, nearest
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import LossModule
from zowrap.step import directions

Batch = dict[str, torch.Tensor]


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        step: makes one step on the batch.
        per_call: the number of steps that one call makes (a sweep over all blocks makes one per block).
        start_seconds: from the model to the end of the first step, with compilation; None if nothing is compiled.
        wrapped: the wrapped model, if the contender is zowrap's.
        replays: its steps replay CUDA graphs that torch.compile recorded.
    """

    name: str
    step: Callable[[], Any]
    per_call: int = 1
    start_seconds: float | None = None
    wrapped: zowrap.ZOModel | None = None
    replays: bool = False


@dataclass(frozen=True)
class Row:
    """The options of a zowrap contender."""

    name: str
    options: dict[str, Any]
    lora: bool = False


LAYER = "one layer per step"
OURS = (
    Row("gaussian", {"rule": "zo_sgd"}),
    Row("gaussian, sequential", {"rule": "zo_sgd", "memory": "sequential"}),
    Row("rademacher", {"rule": "zo_sgd", "direction": "rademacher"}),
    Row("lowrank(1)", {"rule": "zo_sgd", "direction": "lowrank(1)"}),
    Row("population, lowrank(1)", {"rule": "zo_sgd", "estimator": "population"}),
    Row("residual credit", {"rule": "meazo", "estimator": "residual"}),
    Row("residual credit, sequential", {"rule": "meazo", "estimator": "residual", "memory": "sequential"}),
    Row(LAYER, {"rule": "zo_sgd", "blocks": "layer"}),
    Row("LoRA r8", {"rule": "zo_sgd"}, lora=True),
    Row("meazo", {"rule": "meazo"}),
    Row("conmezo", {"rule": "conmezo"}),
    Row("zo_adam", {"rule": "zo_adam"}),
    Row("radazo", {"rule": "radazo"}),
    Row("lozo", {"rule": "lozo"}),
    Row("sparse_mezo", {"rule": "sparse_mezo"}),
)
PLAIN = ("two eager forwards", "two compiled forwards", "classic MeZO")
YARDSTICK = "two compiled forwards"
NAMES = (*PLAIN, *(row.name for row in OURS))


def list_names(rows: Sequence[str]) -> list[str]:
    """List the names of a table with these rows, without repetition and with the plain steps first; by default all.

    Raises:
        ZOError: a name is unknown.
    """
    found = list(dict.fromkeys([*PLAIN, *rows])) if rows else list(NAMES)
    for name in found[len(PLAIN) :]:
        _find_row(name)
    return found


def make_contender(name: str, model: torch.nn.Module, batch: Batch) -> Contender:
    """Build the contender called ``name`` on ``model``, whose weights it moves.

    Raises:
        ZOError: the name is unknown.
    """
    if name == "two eager forwards":
        return Contender(name, lambda: (_compute_loss(model, batch), _compute_loss(model, batch)))
    if name in PLAIN:
        compiled, seconds = _compile_loss(model, batch)
        facts: dict[str, Any] = {"start_seconds": seconds, "replays": _on_gpu(model)}
        if name == YARDSTICK:
            return Contender(name, lambda: (compiled(batch), compiled(batch)), **facts)
        mezo = ClassicMeZO(model, lambda: compiled(batch))
        return Contender(name, mezo.step, **facts)
    return _make_ours(_find_row(name), model, batch)


def _find_row(name: str) -> Row:
    """Find a row of :data:`OURS`, or make one from a rule's name and, in any order and separated by commas, a
    direction, an estimator, a number of queries (``15 queries``) and ``one layer per step``.

    Raises:
        ZOError: the name is neither.
    """
    for row in OURS:
        if row.name == name:
            return row
    rule, *rest = name.split(", ")
    if rule not in rules.REGISTRY and rule not in rules.ALIASES:
        raise ZOError(f"unknown row {name!r}{nearest(name, dict.fromkeys([*NAMES, *rules.REGISTRY]))}")
    options: dict[str, Any] = {"rule": rule}
    for part in rest:
        count, _, unit = part.partition(" ")
        if part == LAYER:
            options["blocks"] = "layer"
        elif part in names.ESTIMATORS:
            options["estimator"] = part
        elif unit == "queries" and count.isdecimal():
            options["queries"] = int(count)
        else:
            directions.get(part)
            options["direction"] = part
    return Row(name, options)


def needs_own_model(name: str) -> bool:
    """Whether a contender changes the model's modules, and so cannot share it with others."""
    return any(row.lora for row in OURS if row.name == name)


def _make_ours(row: Row, model: torch.nn.Module, batch: Batch) -> Contender:
    if row.lora:
        model = _with_adapters(model)
    start = time.perf_counter()
    # Fix the schedule, so that a row does not depend on the free memory.
    zm = zowrap.zo_wrap(model, lr=1e-7, engine="compiled", **{"memory": "paired", **row.options})
    blocks = len(zm.inspect().blocks)
    for _ in range(blocks):
        zm.step(**batch)
    seconds = time.perf_counter() - start

    def sweep() -> None:
        for _ in range(blocks):
            zm.step(**batch)

    return Contender(row.name, sweep, per_call=blocks, start_seconds=seconds, wrapped=zm)


def _with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    try:
        import peft
    except ImportError:
        raise ZOError("the LoRA row needs peft: pip install 'zowrap[peft]', or choose rows with --row") from None
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()  # type: ignore[arg-type]


@torch.no_grad()
def _compute_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def _on_gpu(model: torch.nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _compile_loss(model: torch.nn.Module, batch: Batch) -> tuple[Callable[[Batch], torch.Tensor], float]:
    """Compile the plain loss with torch.compile for this batch size; also return the seconds of its first call."""
    cache.use_cache_folder()  # keep the yardstick's code in the same cache as ours, for a fair start time
    module = LossModule(model)
    # On a GPU use CUDA graphs, as we do: without them small batches wait for kernel launches.
    mode = "reduce-overhead" if _on_gpu(module) else None
    function = torch.compile(lambda b: torch.sum(module(b)[0]), dynamic=False, mode=mode)

    @torch.no_grad()
    def call(given: Batch) -> torch.Tensor:
        with evaluation_mode(module):
            return function(given)

    start = time.perf_counter()
    call(batch)
    return call, time.perf_counter() - start


@dataclass
class ClassicMeZO:
    """The published algorithm (2305.17333, Algorithm 1), which perturbs the weights in place.

    Noise comes from torch's generator with one seed per step, and is drawn four times: +ε, −2ε, +ε, update.
    """

    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]
    lr: float = 1e-7
    eps: float = 1e-3
    steps: int = 0
    parameters: list[torch.Tensor] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def step(self) -> None:
        """Make one step."""
        self._move(self.eps)
        higher = self.loss()
        self._move(-2 * self.eps)
        lower = self.loss()
        self._move(self.eps)
        projected_grad = float(higher - lower) / (2 * self.eps)
        self._move(-self.lr * projected_grad)
        self.steps += 1

    def _move(self, coefficient: float) -> None:
        torch.manual_seed(self.steps)
        for p in self.parameters:
            z = torch.normal(mean=0.0, std=1.0, size=p.shape, device=p.device, dtype=p.dtype)
            p.add_(z, alpha=coefficient)
