"""Measure one case: the time of each row against two plain forwards of the same model and batch, and memory."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

import zowrap
from benchmarks.gpu import first_order
from benchmarks.gpu.cases import FIRST, Case
from zowrap.analysis.costs import CostModel
from zowrap.bench import architectures, contenders, measure
from zowrap.errors import ZOCaptureError

# Hash, table look-up and sign of one random number, counted in zowrap/numerics/noise.py.
INTEGER_OPERATIONS = 24
# Our rows that tune adapters: "gaussian" on a plain base, and on 8-bit weights.
ADAPTERS = ("LoRA r8", "adapters")


def run(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure every row, and yield one record for each; a row that does not fit into memory has an ``"error"``."""
    for name in case.rows:
        model = batch = None
        try:
            model = _model(case)
            batch = architectures.make_batch(model, case.rows_of_batch, case.length)
            record = _row(case, name, model, batch, rounds)
        except torch.cuda.OutOfMemoryError:
            record = {"error": "does not fit"}
        yield {"case": case.name, "row": name, **record}
        del model, batch
        _free()


def _row(case: Case, name: str, model: Any, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    if name in ADAPTERS:  # they take part in the plain forwards, too
        model = first_order.with_adapters(model).eval()
    plain = contenders.make_contender(contenders.YARDSTICK, model, batch)
    memory = {
        "resting": _held(),
        "inference": measure.measure_peak_bytes(
            contenders.make_contender("two eager forwards", model, batch), model.device
        ),
    }
    contender, costs = _contender(case, name, model, batch)
    peak = measure.measure_peak_bytes(contender, model.device)
    memory["peak"] = None if peak is None else _held() + peak  # held: the rule's or the optimiser's state, too
    if name in FIRST:
        # Its model trains: the plain forward would run through the very hooks that training put in.
        return {"seconds": measure.summarise_spread(measure.time_steps(contender, rounds)), **memory}
    times = measure.time_interleaved([plain, contender], rounds)
    seconds, ratios = zip(*times[contender.name], strict=True)
    return {
        "seconds": measure.summarise_spread(seconds),
        "ratio": measure.summarise_spread(ratios),
        **memory,
        "costs": costs,
    }


def _contender(
    case: Case, name: str, model: Any, batch: dict[str, torch.Tensor]
) -> tuple[contenders.Contender, dict[str, Any] | None]:
    """Build the contender of a row, with the bytes and integer operations that bound its cost from below."""
    if name in FIRST:
        return first_order.make(name, model, batch, case.int8), None
    if name not in ("scales", "adapters"):
        contender = contenders.make_contender("gaussian" if name in ADAPTERS else name, model, batch)
    else:
        zm = zowrap.zo_wrap(model, "zo_sgd", lr=1e-7, engine="compiled", quantized=name)
        zm.step(**batch)
        contender = contenders.Contender(name, functools.partial(zm.step, **batch), wrapped=zm)
    return contender, None if contender.wrapped is None else _roofline(contender.wrapped, batch)


def _roofline(zm: zowrap.ZOModel, batch: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    try:
        costs = CostModel(zm.job, zm.engine, zm.schedule, batch).costs()
    except ZOCaptureError:
        return None
    return {
        "bytes": round(costs.step.bytes),
        "bytes_of_two_forwards": round(costs.forwards.bytes),
        "flops": round(costs.step.flops),
        "flops_of_two_forwards": round(costs.forwards.flops),
        "integer_operations": round(costs.step.noise * INTEGER_OPERATIONS),
    }


def _model(case: Case) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = architectures.build_model(case.arch, getattr(torch, case.dtype), device)
    if not case.int8:
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        _free()
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": device})
    loaded.eval()
    return loaded


def _held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
