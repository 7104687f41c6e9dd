"""A run keeps what its first start settled: the learning rate that was chosen, the steps that a warm-up spans."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import zowrap
from tests.support.slow import slow_except
from tests.support.tiny_run import collate, rows, same_weights, tiny_llama, trainer_in
from zowrap import rules
from zowrap.errors import ZOError
from zowrap.training import auto_lr
from zowrap.training.auto_lr import settle_lr
from zowrap.training.config import ZOConfig
from zowrap.training.replay import replay_run
from zowrap.training.run_folder import Run
from zowrap.training.signals import Interrupted


class StopAfter(TrainerCallback):
    """Ends the process, as far as the run can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StopWhileChoosing(TrainerCallback):
    """Ends the process, or asks the run to end, at an evaluation of the search."""

    def __init__(self, evaluation: int, with_signal: bool = False) -> None:
        self.evaluation, self.with_signal = evaluation, with_signal

    def on_choose_lr(self, done: int, most: int) -> None:
        if done == self.evaluation:
            if not self.with_signal:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def killed(folder: Path, callback: TrainerCallback, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer_in(folder, callbacks=[callback], **options).train()


AUTO = {"learning_rate": "auto"}


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the learning rate was chosen again")

    monkeypatch.setattr(auto_lr, "tune_lr", refuse)


def test_the_choice_is_recorded_used_and_told(tmp_path, capsys):
    trainer = trainer_in(tmp_path, **AUTO)
    trainer.train()
    header, *records = journal(tmp_path)
    choice = header["plan"]["choice"]
    assert trainer.lr_choice == choice == Run(tmp_path).status()["plan"]["choice"]
    assert header["plan"]["learning_rate"] == choice["lr"] == trainer.args.learning_rate
    assert {record["lr"] for record in records} == {choice["lr"]} and len(records) == 24
    assert choice["steps"] == 24 and 0 < choice["forwards"] <= 32
    assert f"lr {choice['lr']:.2e} chosen for 24 steps with {choice['forwards']} forwards" in capsys.readouterr().err
    # Choosing changes nothing else: the run is the one with that rate given.
    trainer_in(tmp_path / "given", learning_rate=choice["lr"]).train()
    assert same_weights(tmp_path, tmp_path / "given")


@pytest.mark.parametrize("name", slow_except(["zo_adam"], ["zo_sgd", "zo_adam", "conmezo", "lozo_m"]))
def test_a_killed_run_goes_on_with_its_choice(tmp_path, name, request):
    options = {**AUTO, "rule": name, "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}
    trainer_in(tmp_path / "whole", **options).train()
    killed(tmp_path / "cut", StopAfter(9), **options)
    request.getfixturevalue("no_search")
    resumed = trainer_in(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.resumed_from > 0
    assert journal(tmp_path / "whole")[1:] == journal(tmp_path / "cut")[1:]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    replayed = replay_run(tiny_llama(), tmp_path / "whole", to=tmp_path / "replayed")
    assert replayed.step_count == 24
    last = trainer_in(tmp_path / "last", eval_dataset=None, **{**options, "learning_rate": resumed.args.learning_rate})
    last.train()
    assert same_weights(tmp_path / "replayed", tmp_path / "last")


def test_a_checkpoint_alone_keeps_the_choice(tmp_path, request):
    options = {**AUTO, "lr_scheduler_type": "linear"}
    trainer_in(tmp_path / "whole", **options, save_total_limit=0).train()
    request.getfixturevalue("no_search")
    trainer_in(tmp_path / "other", **options).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert journal(tmp_path / "other")[1:] == journal(tmp_path / "whole")[13:]
    (tmp_path / "whole" / "journal.jsonl").unlink()
    for later in ("checkpoint-24", "checkpoint-22", "checkpoint-20"):
        for file in (tmp_path / "whole" / later).glob("*"):
            file.unlink()
        if (tmp_path / "whole" / later).exists():
            (tmp_path / "whole" / later).rmdir()
    trainer_in(tmp_path / "whole", **options).train(resume_from_checkpoint=True)
    assert journal(tmp_path / "whole")[-1] == journal(tmp_path / "other")[-1]


@pytest.mark.parametrize("evaluation", slow_except([3], [0, 3]))
def test_a_kill_while_choosing_loses_nothing(tmp_path, evaluation):
    trainer_in(tmp_path / "whole", **AUTO).train()
    killed(tmp_path / "cut", StopWhileChoosing(evaluation), **AUTO)
    assert Run(tmp_path / "cut").recorded_steps() == 0
    trainer_in(tmp_path / "cut", **AUTO).train(resume_from_checkpoint=True)
    assert journal(tmp_path / "cut") == journal(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_signal_while_choosing_ends_the_run_at_once(tmp_path):
    trainer_in(tmp_path / "whole", **AUTO).train()
    trainer = trainer_in(tmp_path / "cut", callbacks=[StopWhileChoosing(2, with_signal=True)], **AUTO)
    trainer.train()
    assert trainer.interrupted and trainer.zm.step_count == 0
    trainer_in(tmp_path / "cut", **AUTO).train(resume_from_checkpoint=True)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_kill_before_the_first_step_keeps_the_choice(tmp_path, request):
    class StopBefore(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer_in(tmp_path / "whole", **AUTO).train()
    killed(tmp_path / "cut", StopBefore(), **AUTO)
    assert len(journal(tmp_path / "cut")) == 1
    request.getfixturevalue("no_search")
    trainer_in(tmp_path / "cut", **AUTO).train(resume_from_checkpoint=True)
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_resumed_schedule_starts_from_the_runs_own_rate(tmp_path, capsys):
    options = {"lr_scheduler_type": "linear", "learning_rate": 1e-3}
    trainer_in(tmp_path / "whole", **options).train()
    killed(tmp_path / "cut", StopAfter(9), **options)
    trainer_in(tmp_path / "cut", **{**options, "learning_rate": 0.5}).train(resume_from_checkpoint=True)
    assert "going on with learning rate 0.001, as the run began, not 0.5" in capsys.readouterr().err
    assert [r["lr"] for r in journal(tmp_path / "cut")[1:]] == [r["lr"] for r in journal(tmp_path / "whole")[1:]]
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_the_folder_as_it_was(tmp_path):
    def broken(model, batch):
        return model(**batch).loss * math.nan

    trainer = trainer_in(tmp_path / "run", loss_fn=broken, **AUTO)
    with pytest.raises(ZOError, match="not finite from the start"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_the_two_names_of_the_option():
    def config(**options: Any) -> ZOConfig:
        return ZOConfig(output_dir="x", report_to="none", **options)

    assert config(lr="2e-3").learning_rate == config(lr=2e-3).learning_rate == 2e-3
    assert config(lr="auto").auto_lr and config(learning_rate="auto").auto_lr and not config().auto_lr
    assert config(lr=1e-3, learning_rate=1e-3).learning_rate == 1e-3
    assert config(lr="auto").learning_rate == rules.get("meazo").lr  # until it is chosen
    with pytest.raises(ZOError, match="two names of one option"):
        config(lr="auto", learning_rate=1e-3)
    with pytest.raises(ZOError, match="or 'auto', got 'fast'"):
        config(lr="fast")


# --- without a Trainer ----------------------------------------------------------------------------------------------


def settle(plan: dict[str, Any], watch: Any = None, batches: Any = (), **options: Any) -> dict[str, Any]:
    """Settle the learning rate of 24 steps of a tiny model."""
    zm = zowrap.zo_wrap(tiny_llama(), lr="auto", engine="eager")
    args = ZOConfig(output_dir="x", report_to="none", eval_strategy="steps", **options)
    before = args.learning_rate
    settled = settle_lr(zm, args, plan, 24, batches, watch or (lambda done, most: None))
    assert args.learning_rate == before and zm.step_count == 0
    return settled


def test_a_rate_that_is_given_or_recorded_needs_no_batches(no_search: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert settle({}, lr=0.5) == {"learning_rate": 0.5}
    assert settle({"learning_rate": 0.5}, lr=0.5) == {"learning_rate": 0.5}
    assert capsys.readouterr().err == ""
    assert settle({"learning_rate": 0.25}, lr=0.5) == {"learning_rate": 0.25}
    assert "going on with learning rate 0.25, as the run began, not 0.5" in capsys.readouterr().err
    assert settle({"learning_rate": 0.25}, lr="auto") == {"learning_rate": 0.25}
    assert "going on with learning rate 0.25, as it was chosen at the first start" in capsys.readouterr().err


@pytest.mark.parametrize(("scheduler", "known"), [("linear", True), ("reduce_lr_on_plateau", False)])
def test_a_choice_is_made_for_the_schedule_and_joins_the_plan(
    monkeypatch: pytest.MonkeyPatch, scheduler: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    tune = auto_lr.tune_lr

    def seen(*args: Any, **options: Any) -> Any:
        given.update(options)
        return tune(*args, **options)

    monkeypatch.setattr(auto_lr, "tune_lr", seen)
    evaluations: list[tuple[int, int]] = []
    batches = [[collate(rows()[:4])], [collate(rows()[4:8])]]
    settled = settle({}, lambda *done: evaluations.append(done), batches, lr="auto", lr_scheduler_type=scheduler)
    assert list(settled) == ["choice", "learning_rate"]
    assert settled["learning_rate"] == settled["choice"]["lr"] and settled["choice"]["steps"] == 24
    assert [done for done, _ in evaluations] == list(range(len(evaluations))) and evaluations
    assert capsys.readouterr().err.startswith(f"lr {settled['learning_rate']:.2e} chosen for 24 steps")
    schedule = given["schedule"]
    assert (schedule is not None) == known
    assert not known or [schedule(0), schedule(12), schedule(24)] == [1.0, 0.5, 0.0]


def test_an_error_of_the_watch_stops_the_choice() -> None:
    def stop(done: int, most: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        settle({}, stop, [[collate(rows()[:4])]], lr="auto")


# --- a warm-up spans the steps planned ----------------------------------------------------------------------------


@pytest.mark.slow
def test_conmezo_warms_up_over_the_steps_planned(tmp_path):
    options = {"rule": "conmezo", "learning_rate": 1e-3}
    trainer = trainer_in(tmp_path / "whole", **options)
    trainer.train()
    assert trainer.zm.rule.hyper["warmup"] == 24
    assert float(trainer.zm.state_dict()["scalars/all/warmup"]) == 24
    trainer_in(tmp_path / "constant", **options, rule_options={"warmup": False}).train()
    assert journal(tmp_path / "constant")[0]["hyper"]["warmup"] is False
    assert not same_weights(tmp_path / "whole", tmp_path / "constant")

    # Told to go on for longer, the run still warms up over the steps that were planned first.
    killed(tmp_path / "cut", StopAfter(9), **options)
    longer = trainer_in(tmp_path / "cut", **options, max_steps=30)
    longer.train(resume_from_checkpoint=True)
    assert longer.zm.rule.hyper["warmup"] == 24
    assert journal(tmp_path / "cut")[1:25] == journal(tmp_path / "whole")[1:]
    replay_run(tiny_llama(), tmp_path / "whole", to=tmp_path / "replayed")
    given = trainer_in(tmp_path / "given", **options, rule_options={"warmup": 24}, eval_dataset=None)
    given.train()
    assert same_weights(tmp_path / "replayed", tmp_path / "given")


def test_epochs_are_steps_planned(tmp_path):
    trainer = trainer_in(tmp_path, rule="conmezo", learning_rate=1e-3, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.zm.rule.hyper["warmup"] == 2 * len(rows()) // 4 == trainer.zm.step_count


def test_the_library_does_not_warm_up_by_itself():
    zm = zowrap.zo_wrap(tiny_llama(), "conmezo", engine="eager")
    assert float(zm.state_dict()["scalars/all/warmup"]) == 0
