"""What a script for the Trainer relies on: groups of the optimiser, changed arguments, evaluations, the best model."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from tests.support.tiny_run import collate, rows, same_weights, tiny_llama, trainer_in
from zowrap.errors import ZOError
from zowrap.training.config import ZOConfig
from zowrap.training.replay import replay_run
from zowrap.training.run_folder import Run
from zowrap.training.trainer import ZOTrainer


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "projected_grad" not in line]


class SetsGroups(TrainerCallback):
    """Sets an entry of the groups with these indices, before each step."""

    def __init__(self, name: str, value: float, *groups: int) -> None:
        self.name, self.value, self.groups = name, value, groups

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in self.groups:
            optimizer.param_groups[group][self.name] = self.value / (1 + state.global_step)


# --- the groups of the optimiser ------------------------------------------------------------------------------------


def test_the_optimizer_has_the_trainers_groups_with_and_without_weight_decay(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_in(tmp_path, model, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    decaying, others = ([names[id(each)] for each in group["params"]] for group in trainer.optimizer.param_groups)
    assert others and all("norm" in name for name in others) and not any("norm" in name for name in decaying)
    assert sorted(decaying + others) == sorted(names.values())
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert trainer.get_learning_rates() == [1e-3, 1e-3]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_weight_decay_set_by_a_callback_is_the_steps_and_recorded(tmp_path: Path, accumulated: int) -> None:
    options = {"max_steps": 3, "weight_decay": 0.5, "eval_dataset": None, "gradient_accumulation_steps": accumulated}
    trainer_in(tmp_path / "a", callbacks=[SetsGroups("weight_decay", 0.5, 0)], **options).train()
    trainer_in(tmp_path / "b", **options).train()
    assert [record["weight_decay"] for record in journal(tmp_path / "a")] == [0.5, 0.25, 0.5 / 3]
    assert not same_weights(tmp_path / "a", tmp_path / "b")
    replay_run(tiny_llama(), tmp_path / "a", tmp_path / "again")
    assert same_weights(tmp_path / "a", tmp_path / "again")


@pytest.mark.parametrize(
    ("callback", "decay", "told"),
    [
        (SetsGroups("lr", 1e-2, 0), 0.0, "learning rates 0.001 and 0.01"),
        pytest.param(SetsGroups("weight_decay", 0.5, 0), 0.0, "give weight_decay=", marks=pytest.mark.slow),
        pytest.param(SetsGroups("weight_decay", 0.5, 0, 1), 0.5, "never vectors", marks=pytest.mark.slow),
    ],
)
def test_groups_that_no_rule_can_follow_are_refused(
    tmp_path: Path, callback: TrainerCallback, decay: float, told: str
) -> None:
    trainer = trainer_in(tmp_path, weight_decay=decay, callbacks=[callback], eval_dataset=None)
    with pytest.raises(ZOError, match=told):
        trainer.train()
    assert trainer.zm.step_count == 0


# --- arguments that change after the trainer was made ---------------------------------------------------------------


def test_options_changed_before_the_first_step_count(tmp_path: Path) -> None:
    changed = trainer_in(tmp_path / "a", max_steps=3, eval_dataset=None)
    changed.args.eps, changed.args.seed, changed.args.queries = 1e-2, 8, 2
    changed.train()
    trainer_in(tmp_path / "b", max_steps=3, eval_dataset=None, eps=1e-2, seed=8, queries=2).train()
    # The noise, and the order of the data that follows from the seed as well.
    assert journal(tmp_path / "a") == journal(tmp_path / "b")
    with pytest.raises(ZOError, match="eps was changed after step 3"):
        changed.args.eps, changed.args.max_steps = 1e-3, 6
        changed.train(resume_from_checkpoint=True)
    wrong = trainer_in(tmp_path / "c")
    wrong.args.eps = 0.0
    with pytest.raises(ZOError, match="eps"):
        wrong.train()
    assert not (tmp_path / "c" / "journal.jsonl").exists()


@pytest.mark.slow
def test_a_seed_changed_between_trainings_is_that_of_the_data_too(tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 1e-3, "engine": "eager", "report_to": "none", "overwrite": True}

    def make(seed: int, name: str) -> ZOTrainer:
        args = ZOConfig(str(tmp_path / name), seed=seed, disable_tqdm=True, **options)
        return ZOTrainer(None, args, collate, rows(), model_init=lambda: tiny_llama())

    twice, once = make(7, "a"), make(8, "b")
    twice.train()
    twice.args.seed = 8
    twice.train()
    once.train()
    assert journal(tmp_path / "a") == journal(tmp_path / "b")
    assert ZOConfig("x", seed=3, data_seed=5, report_to="none").data_seed == 5


# --- evaluations and the best model ---------------------------------------------------------------------------------


class Returns(ZOTrainer):
    """Adds a metric to what an evaluation returns, which no callback is told; it is the best after step 4."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = super().evaluate(*args, **kwargs)
        return {**found, "eval_score": -abs(self.state.global_step - 4.0)}


def returning_trainer(folder: Path, **options: Any) -> Returns:
    given = {"max_steps": 8, "eval_steps": 2, "save_steps": 2, "learning_rate": 1e-3, "metric_for_best_model": "score"}
    quiet = {"engine": "eager", "report_to": "none", "disable_tqdm": True, "load_best_model_at_end": True}
    args = ZOConfig(str(folder), **{**given, **quiet, "save_total_limit": 0, **options})
    return Returns(tiny_llama(), args, collate, rows(), eval_dataset=rows()[:8])


@pytest.mark.slow
def test_a_metric_that_an_override_returns_chooses_the_best_model(tmp_path: Path) -> None:
    trainer = returning_trainer(tmp_path)
    trainer.train()
    assert (trainer.best_step, trainer.best_metric) == (4, 0.0)
    root, best, last = (load_file(tmp_path / at / "model.safetensors") for at in (".", "checkpoint-4", "checkpoint-8"))
    assert all(tensor.equal(best[name]) for name, tensor in root.items())
    assert not all(tensor.equal(last[name]) for name, tensor in root.items())
    assert [line["eval_score"] for line in evaluations(tmp_path) if "eval_score" in line] == [-4, -2, 0, -2, -4]
    # A run that goes on knows it, and a schedule that follows the loss has seen each evaluation once.
    longer = returning_trainer(tmp_path, max_steps=12)
    longer.train(resume_from_checkpoint=True)
    assert longer.best_step == 4
    assert sum("eval_loss" in line for line in evaluations(tmp_path)) == 7


@pytest.mark.slow
def test_the_state_says_at_the_end_which_model_is_the_best_and_where_it_lies(tmp_path: Path) -> None:
    told = []

    class Asks(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append((state.best_model_checkpoint, state.best_global_step, state.best_metric))

    options = {"max_steps": 6, "eval_steps": 2, "save_steps": 2}
    trainer = trainer_in(tmp_path / "a", callbacks=[Asks()], **options)
    trainer.train()
    assert told == [(str(tmp_path / "a"), trainer.best_step, trainer.best_metric)]
    assert Run(tmp_path / "a").checkpoints() == [6]  # which a longer run goes on from
    again = trainer_in(tmp_path / "a", **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "a")
    without = trainer_in(tmp_path / "b", eval_dataset=None, **options)
    without.train()
    assert without.state.best_model_checkpoint is None
    early = trainer_in(
        tmp_path / "c", metric_for_best_model="loss", callbacks=[EarlyStoppingCallback(1, 1e9)], **options
    )
    assert early.train().global_step == 4 and early.state.best_model_checkpoint == str(tmp_path / "c")


def test_a_trainer_that_evaluates_by_generating(tmp_path: Path) -> None:
    @dataclass
    class Arguments(ZOConfig, Seq2SeqTrainingArguments):
        pass

    class Generates(Seq2SeqTrainer, ZOTrainer):
        pass

    def count_exact(found: Any) -> dict[str, float]:
        kinds.append((found.predictions.ndim, found.predictions.dtype.kind))
        return {"exact": float((found.predictions[:, 1:3] == found.label_ids[:, :2]).mean())}

    kinds: list[tuple[int, str]] = []
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    data = [{"input_ids": [1 + row, 2, 3], "attention_mask": [1, 1, 1], "labels": [2, 3]} for row in range(8)]
    args = Arguments(str(tmp_path), max_steps=2, eval_steps=1, predict_with_generate=True,
                     metric_for_best_model="exact", engine="eager", report_to="none", disable_tqdm=True)  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    trainer = Generates(model, args, collate, data, eval_dataset=data[:4], compute_metrics=count_exact)
    trainer.train()
    assert len(journal(tmp_path)) == 2 and trainer.best_metric == max(
        line["eval_exact"] for line in evaluations(tmp_path)
    )
    assert kinds == [(2, "i")] * 3  # tokens, and no logits


# --- signals and memory ---------------------------------------------------------------------------------------------


def test_a_checkpoint_on_sigterm_can_be_asked_for(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_in(tmp_path, enable_jit_checkpoint=True, callbacks=[Stops()], eval_dataset=None)
    assert signal.getsignal(signal.SIGTERM) is before  # outside of a training the process dies as it did
    assert trainer.args.enable_jit_checkpoint and not [w for w in recwarn if "ignored" in str(w.message)]
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step in (3, 4)
    assert Run(tmp_path).checkpoints() == [trainer.state.global_step]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_memory_cache_is_emptied_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    trainer = trainer_in(tmp_path, max_steps=5, torch_empty_cache_steps=2, eval_dataset=None)
    monkeypatch.setattr("zowrap.training.trainer.clear_device_cache", lambda: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [0, 2, 4]
    with pytest.raises(ValueError, match="torch_empty_cache_steps"):
        ZOConfig(str(tmp_path), torch_empty_cache_steps=0)
