"""A run of few steps does not compile longer than it trains: the engine is chosen from counts, said, and kept."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import zowrap
from tests.properties.test_resume import assert_same_run, stop_after
from tests.support.tiny_run import collate, rows, tiny_llama, trainer_in
from zowrap.engines import compile_time
from zowrap.engines.compile_time import compile_seconds
from zowrap.engines.compiled import CompiledEngine
from zowrap.model import choice
from zowrap.model.choice import Planned, saved_seconds, settle_engine

BATCH = collate(rows()[:4])


def wrap(model: torch.nn.Module | None = None, **options: Any) -> zowrap.ZOModel:
    return zowrap.zo_wrap(tiny_llama() if model is None else model, lr=1e-3, **options)


def engine_for(steps: int, zm: zowrap.ZOModel) -> str:
    settle_engine(zm, BATCH, Planned(steps, steps))
    return zm.engine.name


def engine_of(run: Path) -> str:
    return json.loads((run / "journal.jsonl").read_text().splitlines()[0])["environment"]["engine"]


def test_few_steps_are_eager_and_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    trainer = trainer_in(one, engine=None)
    trainer.train()
    said = capfd.readouterr().err
    assert trainer.zm.inspect().engine == "eager" and trainer.zm.inspect().fallen_back is None
    assert said.count("running eagerly, because compiling takes about ") == 1 and "of the 24 steps" in said
    assert "--engine compiled, or engine='compiled', compiles all the same" in said and "compiling the" not in said
    trainer_in(other, engine="eager").train()
    assert "running eagerly" not in capfd.readouterr().err
    assert_same_run(one, other)


@pytest.mark.slow
def test_many_steps_are_compiled_and_stay_so_however_many_are_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_in(tmp_path, engine=None, max_steps=10**6, eval_dataset=None)
    stop_after(trainer, 2)
    trainer.train()
    assert trainer.zm.inspect().engine == engine_of(tmp_path) == "compiled"
    again = trainer_in(tmp_path, engine=None, max_steps=4, eval_dataset=None)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 2 and again.zm.step_count == 4 and again.zm.inspect().engine == "compiled"
    assert "running eagerly" not in capfd.readouterr().err


def test_an_eager_run_stays_eager_however_many_steps_it_is_given(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_in(tmp_path, engine=None, max_steps=6, eval_dataset=None)
    stop_after(trainer, 3)
    trainer.train()
    assert engine_of(tmp_path) == "eager"
    again = trainer_in(tmp_path, engine=None, max_steps=10**6, eval_dataset=None)
    stop_after(again, 5)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 3 and again.zm.inspect().engine == "eager"
    assert "going on with the eager engine, as the run began" in capfd.readouterr().err


def test_a_start_that_was_killed_before_its_first_step_chooses_as_it_was_planned(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_in(tmp_path, engine=None, max_steps=6, eval_dataset=None, callbacks=[Stop()]).train()
    again = trainer_in(tmp_path, engine=None, max_steps=10**6, eval_dataset=None)
    stop_after(again, 2)
    again.train(resume_from_checkpoint=True)
    assert again.zm.inspect().engine == "eager"


def test_the_choice_follows_from_the_number_of_steps() -> None:
    chosen = [engine_for(10**power, wrap()) for power in range(8)]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == "eager" and chosen[-1] == "compiled"
    zm = wrap()
    limit = compile_seconds(zm.job) / saved_seconds(zm, BATCH, Planned(1, 1))
    assert engine_for(int(limit), wrap()) == "eager" and engine_for(int(limit) + 1, wrap()) == "compiled"


def test_no_clock_is_asked() -> None:
    for module in (choice, compile_time):
        imported = {alias.name for node in ast.walk(ast.parse(inspect.getsource(module)))
                    if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
        assert not imported & {"time", "timeit", "datetime", "perf_counter", "monotonic", "process_time"}


@pytest.mark.parametrize(
    ("options", "few"),
    [
        ({"engine": "compiled"}, "compiled"),
        ({"engine": "eager"}, "eager"),
        ({"memory": "sequential"}, "compiled"),  # asked for by those who have little
        ({"memory": "paired"}, "compiled"),  # the eager engine knows no pairs
        ({"blocks": "layer"}, "eager"),
        ({"rule": "fzoo"}, "eager"),
        ({"rule": "lozo"}, "eager"),
    ],
)
def test_what_was_asked_for_is_done(options: dict[str, Any], few: str) -> None:
    assert engine_for(3, wrap(**options)) == few


def test_what_is_compiled_already_stays_compiled() -> None:
    zm = wrap()
    assert isinstance(zm.engine, CompiledEngine)
    zm.engine.executables["the loss"] = None  # type: ignore[index,assignment]
    assert engine_for(3, zm) == "compiled"


def test_a_copy_that_takes_much_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_BYTES", 100)
    assert engine_for(3, wrap()) == "compiled"


def test_more_work_is_compiled_sooner() -> None:
    def saved(batch: dict[str, torch.Tensor] = BATCH, model: torch.nn.Module | None = None, **options: Any) -> float:
        return saved_seconds(wrap(model, **options), batch, Planned(1, 1))

    assert saved(queries=4) > saved() > saved(blocks="layer")
    assert saved(model=tiny_llama(hidden_size=64)) > saved()
    assert saved(batch=collate(rows()[:16])) > saved()
    assert saved(estimator="population") > saved(), "the eager engine evaluates each example by itself"


# Seconds of compilation and of a step more, as they were measured for the models of the table in
# zowrap/model/choice.py.
@pytest.mark.parametrize(
    ("sizes", "shape", "compiles", "more"),
    [
        ((512, 64, 172, 5, 8, 4), (16, 48), 36, 0.030),  # the 260k-parameter Llama
        ((50272, 768, 3072, 12, 12, 12), (8, 64), 31, 15.5),  # about OPT-125M
    ],
)
def test_the_estimates_are_of_the_size_of_what_was_measured(
    sizes: tuple[int, ...], shape: tuple[int, int], compiles: float, more: float
) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**dict(zip(names, sizes, strict=True)), tie_word_embeddings=True))
    zm = wrap(model)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.zeros(shape, dtype=torch.int64)}
    assert compiles / 1.5 < compile_seconds(zm.job) < compiles * 1.5
    assert more / 3 < saved_seconds(zm, batch, Planned(1, 1)) < more * 3
