"""``memory="auto"``: what is chosen, when, and that a choice changes no bit and is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import zowrap
from tests.support.costs import cost_model_of
from tests.support.families import DataDependent, batch, make, snapshot, unchanged
from tests.support.slow import slow_except
from tests.support.tiny_run import same_weights, trainer_in
from zowrap import machine
from zowrap.analysis.costs import CostModel, Costs
from zowrap.analysis.program import ProgramCosts
from zowrap.calibration import learning_rate
from zowrap.compiler import capture as compiled_capture
from zowrap.engines import captures
from zowrap.errors import ZOError
from zowrap.machine import MARGIN
from zowrap.step.parameters import weight_bytes

PLENTY = 1 << 50
SMALL, LARGE = batch("opt", 2, 6), batch("opt", 6, 20)


def wrap(asked: str = "auto", **options: Any) -> zowrap.ZOModel:
    return zowrap.zo_wrap(make("opt"), **{"rule": "zo_sgd", "engine": "compiled", "memory": asked, **options})


def costs_of(inputs: dict[str, Tensor]) -> Costs:
    zm = wrap()
    zm.job.loss.settled = True  # capture alone: nothing is evaluated
    return cost_model_of(zm, inputs).costs()


def free_beside_the_model(peak: int) -> int:
    """Bytes that must be free, once the weights are loaded, for a step of that peak to just fit."""
    return math.ceil(peak / (1 - MARGIN)) - weight_bytes(make("opt"))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[torch.device]]:
    """``free(bytes)`` sets the free memory; the list it returns grows by the device of every question."""

    def set_to(count: int) -> list[torch.device]:
        asked: list[torch.device] = []
        monkeypatch.setattr(machine, "free_memory", lambda device=None: asked.append(device) or count)
        return asked

    return set_to


def schedule_of(zm: zowrap.ZOModel) -> str:
    return zm.inspect().schedule


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"direction": "lowrank(1)"}, {"rule": "fzoo"}], ids=str)
def test_both_schedules_give_the_same_bits(options: dict[str, Any]) -> None:
    """Bit for bit on a CPU; elsewhere no more is promised than rounding."""
    paired, alone = wrap("paired", **options), wrap("sequential", **options)
    for seed in range(3):
        inputs = batch("opt", 3, 9, seed=seed)
        assert torch.equal(paired.step(**inputs).losses, alone.step(**inputs).losses)
    assert unchanged(paired.model, snapshot(alone.model))


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_except(("sequential",), ("paired", "sequential")))
def test_the_first_step_chooses_and_equals_that_schedule_bitwise(free: Any, name: str) -> None:
    """Memory is free for just that schedule, beside weights that are loaded and so are no longer free."""
    asked = free(free_beside_the_model(costs_of(LARGE).schedules[name]))
    auto, explicit = wrap(), wrap(name)
    assert schedule_of(auto) == "auto" and "next step" in auto.inspect().schedule_why
    for inputs in (LARGE, SMALL):
        assert torch.equal(auto.step(**inputs).losses, explicit.step(**inputs).losses)
    assert unchanged(auto.model, snapshot(explicit.model))
    assert asked == [torch.device("cpu")]  # once, and of the model's device
    told = auto.inspect()
    assert told.schedule == name and ("fits" if name == "paired" else "paired needs") in told.schedule_why
    assert f"schedule   {name}: {told.schedule_why}" in str(told)
    assert (told.as_dict()["schedule"], told.as_dict()["schedule_why"]) == (name, told.schedule_why)
    assert told.costs is not None and told.costs.memory.peak == told.costs.schedules[name]
    assert schedule_of(explicit) == name and explicit.inspect().schedule_why == "as asked"
    assert {points for _, _, points in auto.engine.executables} == {2 if name == "paired" else 1}


@pytest.mark.slow
def test_where_memory_is_plentiful_nothing_is_analysed(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the step was analysed")

    monkeypatch.setattr(ProgramCosts, "cost", refuse)
    free(PLENTY)
    zm = wrap()
    zm.step(**SMALL)
    assert schedule_of(zm) == "paired"
    free(0)
    with pytest.raises(AssertionError, match="analysed"):
        wrap().step(**SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("opt", {"blocks": "layer", "rule": "zo_adam"}),
        ("opt", {"direction": "lowrank(2)"}),
        ("llama", {"rule": "zo_sgd"}),
        ("llama", {"estimator": "population"}),
        ("gpt2", {"rule": "fzoo"}),
        ("gemma", {"rule": "conmezo"}),
        ("bert", {"estimator": "population"}),
        ("t5", {"rule": "zo_sgd"}),
    ],
    ids=str,
)
def test_the_bound_is_one(family: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = make(family)
    shapes = {name: value.to("meta") for name, value in batch(family, 64, 60).items()}
    cost_model = cost_model_of(zowrap.zo_wrap(model, **options), shapes)
    values = cost_model.bound() - fixed_part(cost_model)
    needed = cost_model.costs()
    assert needed.memory.transient <= values <= 100 * needed.memory.transient


def fixed_part(cost_model: CostModel) -> int:
    """Of the bound, all but the values of the program: without them it would hold small models in any case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramCosts, "bytes_of_all_values", lambda *_: 0)
        return cost_model.bound()


@pytest.mark.slow
def test_a_larger_batch_asks_again_and_nothing_turns_back(free: Any) -> None:
    asked = free(free_beside_the_model(costs_of(SMALL).schedules["paired"]))
    zm, seen = wrap(), []
    for inputs in (SMALL, SMALL, LARGE, LARGE, SMALL):
        zm.step(**inputs)
        seen.append((schedule_of(zm), len(asked)))
    assert seen == [("paired", 1), ("paired", 1), ("sequential", 2), ("sequential", 2), ("sequential", 2)]
    free(PLENTY)
    zm.step(**batch("opt", 8, 30))
    assert schedule_of(zm) == "sequential"


def test_micro_batches_count_one_by_one(free: Any) -> None:
    asked = free(PLENTY)
    zm = wrap()
    for _ in range(3):
        zm.accumulate(**SMALL)
    assert len(asked) == 1


@pytest.mark.slow
def test_candidates_follow_the_schedule(free: Any) -> None:
    free(0)
    rule = zowrap.rules.zo_sgd(conservative=True)
    auto, explicit = wrap(rule=rule), wrap("sequential", rule=rule)
    assert torch.equal(auto.step(**SMALL).losses, explicit.step(**SMALL).losses)
    assert {points for _, _, points in auto.engine.executables} == {1}


def test_the_eager_engine_chooses_nothing(free: Any) -> None:
    asked = free(0)
    zm = wrap(engine="eager")
    record = zm.step(**SMALL).record()
    assert not asked and schedule_of(zm) == "auto" and "each point by itself" in zm.inspect().schedule_why
    assert "memory" not in record


def test_what_cannot_be_captured_is_tried_once(free: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free(0)
    calls: list[int] = []
    capture = compiled_capture.capture
    monkeypatch.setattr(captures, "capture", lambda *given: calls.append(1) or capture(*given))
    zm = zowrap.zo_wrap(DataDependent(), loss_fn=lambda model, batch: model(batch["x"]).square().mean())
    with pytest.warns(UserWarning, match="running eagerly"):
        zm.step(x=torch.ones(4, 3))
    zm.step(x=torch.ones(5, 3))
    assert len(calls) == 1 and schedule_of(zm) == "auto"


def test_the_choice_of_a_learning_rate_keeps_the_schedule(free: Any) -> None:
    free(0)
    zm = wrap()
    with learning_rate.preserve_state(zm):
        zm.accumulate(**LARGE)
    asked = free(PLENTY)
    zm.step(**SMALL)
    assert schedule_of(zm) == "sequential" and not asked
    assert zm.schedule.name == "sequential"


@pytest.mark.parametrize("backend, free", [("native", 114), ("cudaMallocAsync", 120)])
def test_free_memory_of_a_gpu_counts_what_the_allocator_keeps_for_all(
    monkeypatch: pytest.MonkeyPatch, backend: str, free: int
) -> None:
    """And not what it keeps in the pools of CUDA graphs."""
    device = torch.device("cuda", 1)
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 30}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, {device: figure}.__getitem__)
    segments = [
        {"device": number, "segment_pool_id": pool, "total_size": total, "allocated_size": used}
        for number, pool, total, used in ((1, (0, 0), 38, 24), (1, (0, 7), 12, 6), (0, (0, 7), 90, 0))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    assert machine.free_memory(device) == free


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_resumed_model_keeps_the_choice(free: Any) -> None:
    free(0)
    zm = wrap()
    zm.step(**LARGE)
    state = json.loads(json.dumps({k: v for k, v in zm.state_dict().items() if not isinstance(v, Tensor)}))
    assert state["memory"] == "sequential"
    weights = snapshot(zm.model)
    asked = free(PLENTY)
    other = wrap()
    other.model.load_state_dict(weights)
    other.load_state_dict(zm.state_dict())
    assert schedule_of(other) == "sequential" and "loaded" in other.inspect().schedule_why
    for inputs in (SMALL, batch("opt", 8, 30)):
        assert torch.equal(zm.step(**inputs).losses, other.step(**inputs).losses)
    assert unchanged(other.model, snapshot(zm.model)) and not asked
    assert {points for _, _, points in other.engine.executables} == {1}


def test_a_paired_choice_is_kept_for_batches_no_larger(free: Any) -> None:
    free(PLENTY)
    zm = wrap()
    zm.step(**LARGE)
    asked = free(0)
    other = wrap()
    other.load_state_dict(zm.state_dict())
    other.step(**SMALL)
    other.step(**LARGE)
    assert schedule_of(other) == "paired" and not asked
    other.step(**batch("opt", 8, 30))
    assert schedule_of(other) == "sequential" and len(asked) == 1


def test_the_journal_keeps_the_choice_too(free: Any) -> None:
    """What lies between a checkpoint and the end of a run is replayed, not evaluated."""
    free(0)
    zm = wrap()
    record = json.loads(json.dumps(zm.step(**LARGE).record()))
    asked = free(PLENTY)
    other = wrap()
    with pytest.raises(ZOError, match="unknown memory"):
        other.replay({**record, "memory": "much"})
    assert other.step_count == 0
    other.replay(record)
    assert zm.state_dict()["memory"] == other.state_dict()["memory"] == "sequential"
    assert other.state_dict()["largest_batch"] == zm.state_dict()["largest_batch"] > 0
    other.step(**SMALL)
    assert not asked


def test_a_schedule_that_is_asked_for_wins() -> None:
    zm = wrap("sequential")
    zm.update(projected_grad=torch.tensor(1.0))
    for asked, expected in (("auto", "sequential"), ("paired", "paired"), ("sequential", "sequential")):
        other = wrap(asked)
        other.load_state_dict(zm.state_dict())
        assert schedule_of(other) == other.state_dict()["memory"] == expected


def test_a_state_of_before_the_first_step_leaves_the_choice_open(free: Any) -> None:
    free(PLENTY)
    state = wrap().state_dict()
    assert (state["memory"], state["largest_batch"]) == ("auto", 0)
    zm = wrap()
    zm.step(**SMALL)
    zm.load_state_dict(state)
    assert schedule_of(zm) == "auto"
    free(0)
    zm.step(**SMALL)
    assert schedule_of(zm) == "sequential"
    for wrong in ("much", 1):
        with pytest.raises(ZOError, match="its memory is"):
            zm.load_state_dict({**state, "memory": wrong})


# --- a run ---------------------------------------------------------------------------------------------------------

RUN = {"engine": "compiled", "max_steps": 4, "eval_dataset": None, "save_strategy": "no"}


@pytest.mark.slow
def test_a_run_goes_on_under_its_schedule_or_says_that_it_does_not(
    free: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the journal alone: it holds no checkpoint."""
    free(0)
    trainer_in(tmp_path / "whole", **RUN).train()

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path / "kept", callbacks=[Stop()], **RUN).train()
    shutil.copytree(tmp_path / "kept", tmp_path / "other")
    asked = free(PLENTY)
    kept = trainer_in(tmp_path / "kept", **RUN)
    kept.train(resume_from_checkpoint=True)
    assert kept.resumed_from > 0 and schedule_of(kept.zm) == "sequential" and not asked
    assert same_weights(tmp_path / "kept", tmp_path / "whole")
    assert "memory" not in capfd.readouterr().err
    other = trainer_in(tmp_path / "other", memory="paired", **RUN)
    other.train(resume_from_checkpoint=True)
    assert other.resumed_from > 0 and schedule_of(other.zm) == "paired"
    assert "the run began with memory sequential, now it is paired" in capfd.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "other" / "journal.jsonl").read_text().splitlines()[1:]]
    assert [line["memory"] for line in lines] == ["sequential", "sequential", "paired", "paired"]


def test_the_configuration_judges_the_option(tmp_path: Path) -> None:
    with pytest.raises(ZOError, match="did you mean 'sequential'"):
        zowrap.ZOConfig(output_dir=str(tmp_path), memory="sequental")
