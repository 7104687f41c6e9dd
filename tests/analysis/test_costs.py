"""Predicted costs agree with formulas and with a measured process, and the schedule is chosen by them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import zowrap
from tests.support.costs import cost_model_of
from tests.support.families import batch, make
from tests.support.slow import slow_except
from zowrap import machine
from zowrap.analysis.costs import Costs
from zowrap.bench import measure
from zowrap.bench.contenders import Contender
from zowrap.engines.compiled import CompiledEngine
from zowrap.errors import ZOCaptureError
from zowrap.model.schedule import choose_memory
from zowrap.ops import scratch
from zowrap.rules import REGISTRY
from zowrap.step.parameters import weight_bytes

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 192}


def opt(device: str) -> nn.Module:
    """Return a language model; its head and loss become one operator."""
    config = T.OPTConfig(vocab_size=1024, ffn_dim=768, max_position_embeddings=256, word_embed_proj_dim=192, **SIZES)
    with torch.device(device):
        return T.OPTForCausalLM(config).eval()


def bert(device: str) -> nn.Module:
    """Return a classifier."""
    config = T.BertConfig(vocab_size=512, intermediate_size=768, max_position_embeddings=256, num_labels=3, **SIZES)
    with torch.device(device):
        return T.BertForSequenceClassification(config).eval()


MODELS = {"opt": opt, "bert": bert}


def tokens(kind: str, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    ids = torch.ones(rows, length, dtype=torch.int64, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if kind == "opt" else ids[:, 0]}


@functools.cache
def predicted(kind: str, rows: int, length: int, **options: Any) -> Costs:
    zm = zowrap.zo_wrap(MODELS[kind]("meta"), **{"rule": "zo_sgd", **options})
    return cost_model_of(zm, tokens(kind, rows, length, "meta")).costs()


def measure_here(kind: str, sizes: list[list[int]]) -> list[tuple[int | None, int]]:
    """Measure, for each batch size, the peak bytes that a step allocates in this process, and those it keeps."""
    zm = zowrap.zo_wrap(MODELS[kind]("cpu"), "zo_sgd", engine="compiled")
    found = []
    for rows, length in sizes:
        given = tokens(kind, rows, length, "cpu")
        contender = Contender(kind, lambda given=given: zm.step(**given), wrapped=zm)
        peak = measure.measure_peak_bytes(contender, torch.device("cpu"))
        found.append((peak, sum(t.nbytes for tensors in scratch._own.kept.values() for t in tensors)))
    return found


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("kind", list(MODELS))
def test_predicted_memory_is_the_measured_one(kind: str) -> None:
    """Measure in a process with an allocator that returns freed memory at once, so that only the step's is counted."""
    sizes = [[8, 64], [16, 128]]
    code = "import json; from tests.analysis.test_costs import measure_here; "
    code += f"print(json.dumps(measure_here({kind!r}, {sizes})))"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    for (rows, length), (transient, kept) in zip(sizes, json.loads(done.stdout.splitlines()[-1]), strict=True):
        told = predicted(kind, rows, length).memory
        assert told.scratch == kept
        rest = told.peak - told.transient
        assert transient >= 0.3 * (rest + transient)  # otherwise the weights would hide errors
        assert told.peak == pytest.approx(rest + transient, rel=0.1)
        assert told.transient == pytest.approx(transient, rel=0.1)


def test_schedules_differ_by_one_point() -> None:
    told = predicted("opt", 16, 128)
    inner = 16 * 128 * 768 * 4  # the widest activation of one point
    assert told.memory.peak == told.schedules["paired"]
    assert told.forward_transient >= inner
    alone = predicted("opt", 16, 128, memory="sequential")
    assert alone.memory.peak == alone.schedules["sequential"] == told.schedules["sequential"]
    assert told.memory.transient - alone.memory.transient == pytest.approx(alone.memory.transient, rel=0.25)
    assert alone.step.flops == told.step.flops and alone.step.noise > told.step.noise


def test_state_and_weights_are_exact() -> None:
    model = opt("cpu")
    size = sum(p.numel() * 4 for p in model.parameters())  # tied ones count once
    assert weight_bytes(model) == size + sum(b.nbytes for b in model.buffers())
    told = predicted("opt", 2, 8, rule="zo_adam")
    assert told.memory.weights == weight_bytes(model)
    assert 2 * size <= told.memory.state <= 2 * size + 64


# --- work ----------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_products() -> None:
    rows, length, width, layers, vocabulary = 4, 32, 192, 3, 1024
    told = predicted("opt", rows, length)
    products = 2 * rows * length * layers * (4 * width**2 + 2 * width * 768)
    products += 2 * rows * (length - 1) * width * vocabulary  # the last token predicts nothing
    attention = layers * 4 * rows * length**2 * width
    assert told.forwards.flops == 2 * (products + attention)
    assert told.step.flops == told.forwards.flops  # a step adds no operations


def test_noise_is_drawn_once_for_both_points_and_once_for_the_update() -> None:
    rows, length = 4, 32
    model = opt("meta")
    elements = {name: p.numel() for name, p in model.named_parameters()}
    looked_up = 2 * rows * length * 192  # the looked-up rows of the two embeddings
    tables = sum(count for name, count in elements.items() if "embed_positions" in name)
    total = sum(elements.values())
    assert predicted("opt", rows, length).step.noise == total + total - tables + looked_up
    assert predicted("opt", rows, length, direction="lowrank(1)").step.noise < total / 20


def test_every_weight_is_read_once_for_both_points() -> None:
    told = predicted("bert", 2, 16)
    assert told.step.weight_bytes < 0.6 * told.forwards.weight_bytes
    assert told.step.update_bytes == 2 * sum(p.numel() * 4 for p in bert("meta").parameters())


def test_one_block_costs_less_than_all_and_blocks_are_averaged() -> None:
    whole, blocks = predicted("bert", 8, 64), predicted("bert", 8, 64, blocks="layer")
    assert 0.5 * whole.step.flops < blocks.step.flops < 0.9 * whole.step.flops
    assert blocks.step.update_bytes < 0.5 * whole.step.update_bytes
    assert blocks.memory.transient <= whole.memory.transient


# --- without weights -----------------------------------------------------------------------------------------------


# Full-rank without and with state that directions read, whole-tensor thresholds, candidates, low-rank state.
@pytest.mark.parametrize("rule", slow_except(["sparse_mezo", "lozo"], ["conmezo", "sparse_mezo", "fzoo", "lozo"]))
def test_rules_can_be_asked_about_without_weights(rule: str) -> None:
    told = cost_model_of(zowrap.zo_wrap(empty("opt"), rule), _shapes("opt")).costs()
    assert told.memory.peak > told.memory.weights > 0 and told.step.flops > 0


def test_every_rule_can_be_wrapped_without_weights() -> None:
    for rule in REGISTRY:
        zm = zowrap.zo_wrap(empty("opt"), rule)
        evaluations = cost_model_of(zm, _shapes("opt")).evaluations(sequential=True)
        assert sum(max(points, 1) for points in evaluations) == zm.inspect().forwards, rule


@pytest.mark.parametrize("family", slow_except(["bert"], ["llama", "gpt2", "bert", "t5"]))
def test_families_cost_the_same_with_and_without_weights(family: str) -> None:
    live = zowrap.zo_wrap(make(family), "zo_sgd", engine="compiled")
    live.job.loss.settled = True  # a model without values has nothing to compare losses on
    other_zm = zowrap.zo_wrap(empty(family), "zo_sgd", engine="compiled")
    one, other = (
        cost_model_of(zm, _shapes(family, device)).costs() for zm, device in ((live, "cpu"), (other_zm, "meta"))
    )
    assert one.step.flops == other.step.flops > 0
    assert one.memory.peak == pytest.approx(other.memory.peak, rel=0.02)


@pytest.mark.slow
def test_a_population_costs_without_weights() -> None:
    told = cost_model_of(zowrap.zo_wrap(empty("bert"), estimator="population"), _shapes("bert")).costs()
    assert told.step.flops > told.forwards.flops > 0


def empty(family: str) -> nn.Module:
    """Build the family's model on the meta device, because moving a model there would untie its weights."""
    with torch.device("meta"):
        return make(family)


def _shapes(family: str, device: str = "meta") -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch(family, 4, 12).items()}


# --- of a live model -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_live_model_tells_the_costs_of_its_last_batch() -> None:
    zm = zowrap.zo_wrap(make("opt"), "zo_sgd", engine="compiled")
    assert zm.inspect().costs is None and "no batch" in str(zm.inspect().as_dict()["costs_unknown"])
    given = batch("opt", 4, 12)
    zm.step(**given)
    compiled = zm.inspect().compile_count
    told = zm.inspect()
    assert told.costs is not None and told.costs.sizes["input_ids"] == tuple(given["input_ids"].shape)
    record = json.loads(json.dumps(told.as_dict()["costs"]))
    assert record["memory"]["peak"] == record["memory"]["paired"] > record["memory"]["weights"]
    assert record["step"]["bytes"] == sum(
        record["step"][f"{part}_bytes"] for part in ("weight", "activation", "update")
    )
    assert "two plain forwards" in str(told) and zm.inspect().compile_count == compiled
    zm.loss(**{name: value[:1] for name, value in given.items()})
    smaller = zm.inspect().costs
    assert smaller is not None and smaller.step.flops < told.costs.step.flops


def test_a_model_that_runs_eagerly_says_so() -> None:
    zm = zowrap.zo_wrap(make("opt"), "zo_sgd", engine="eager")
    zm.step(**batch("opt", 4, 12))
    told = zm.inspect().as_dict()
    assert told["costs"] is None and "runs eagerly" in told["costs_unknown"]
    with pytest.raises(ZOCaptureError, match="eagerly"):
        cost_model_of(zm, batch("opt", 4, 12))


# --- the schedule that fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "schedule", "why"),
    [(2000, "paired", "faster"), (1000, "sequential", "paired needs"), (500, "sequential", "neither fits")],
)
def test_the_faster_schedule_that_fits_is_chosen(free: int, schedule: str, why: str) -> None:
    chosen, reason = choose_memory(1000, 800, free)
    assert chosen == schedule and why in reason


def test_a_schedule_that_saves_nothing_is_not_chosen() -> None:
    assert choose_memory(1000, 1000, 100)[0] == "paired"


def test_a_cgroup_limits_what_is_free(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    folder = tmp_path / "v2" / "outer" / "inner"
    folder.mkdir(parents=True)
    own.write_text("0::/outer/inner\n")
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("10\n")
    (folder.parent / "memory.max").write_text("1000\n")
    (folder.parent / "memory.current").write_text("400\n")
    (folder.parent / "memory.stat").write_text("anon 300\ninactive_file 100\n")
    assert list(machine._left_in_cgroups(tmp_path / "v2", own)) == [700]
    own.write_text("4:memory:/job\n3:cpu:/\n")
    folder = tmp_path / "v1" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    (folder / "memory.usage_in_bytes").write_text("1000\n")
    assert list(machine._left_in_cgroups(tmp_path / "v1", own)) == [4000]
    assert list(machine._left_in_cgroups(tmp_path, tmp_path / "nothing")) == []


def test_a_graph_is_built_once_for_all_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs of another schedule or block reuse the captured program."""
    captures: list[int] = []
    own = CompiledEngine.captured
    monkeypatch.setattr(CompiledEngine, "captured", lambda self, b: captures.append(1) or own(self, b))
    cost_model = cost_model_of(zowrap.zo_wrap(empty("opt"), "zo_sgd"), _shapes("opt"))
    cost_model.costs()
    count = len(captures)
    cost_model.costs(sequential=True)
    assert len(captures) == count
