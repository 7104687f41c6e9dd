"""The runner of the Trainer's own tests, on a checkout of a few tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.external.trainer_suite import REASONS, Outcome, convert

SUITE = """
import unittest
import torch
from transformers import Trainer, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1))
        self.config = None

    def forward(self, input_x, labels=None):
        y = input_x * self.a
        return (torch.nn.functional.mse_loss(y, labels), y)


class TinyTest(unittest.TestCase):
    def train(self, **options):
        rows = [{"input_x": float(i), "labels": 2.0 * i} for i in range(16)]
        trainer = Trainer(Net(), TrainingArguments("out", max_steps=4, use_cpu=True, **options), train_dataset=rows)
        trainer.train()
        return trainer

    def test_steps(self):
        self.assertEqual(self.train(logging_steps=2, save_strategy="no").state.global_step, 4)

    def test_again(self):
        self.assertEqual(self.train().state.global_step, 4)

    def test_bnb_optim_sgd(self):
        self.assertEqual(self.train(optim="sgd").state.global_step, 4)

    def test_fails_with_both(self):
        self.fail("not here")

    def test_that_has_no_reason(self):
        self.assertFalse(hasattr(Trainer, "wrap"), "this is another trainer")
"""


def test_a_suite_is_counted_against_what_the_trainer_passes(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "trainer"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "test_trainer_tiny.py").write_text(SUITE)
    (folder / "test_trainer_distributed.py").write_text("raise AssertionError('needs several processes')")
    command = [sys.executable, "-m", "tests.external.trainer_suite", str(tmp_path), "--list"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    lines = told.stdout.splitlines()
    assert told.returncode == 1
    assert lines[0].startswith("rightly fails  TinyTest::test_bnb_optim_sgd: it is about an optimiser")
    assert lines[1].startswith("FAILED         TinyTest::test_that_has_no_reason: AssertionError: True is not false")
    assert lines[2] == ("2 of the 4 tests that the Trainer passes here pass, 1 rightly fail, 1 fail without a reason")
    told = subprocess.run([*command[:-2], str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 1 and "is no checkout of transformers" in told.stderr


def test_an_outcome_is_limited_to_what_the_trainer_passes() -> None:
    outcome = Outcome(["a", "b"], {"c": "wrong", "d": "wrong"}).limit_to(["a", "c", "e"])
    assert outcome == Outcome(["a"], {"c": "wrong", "e": "it did not run"})
    assert Outcome([], {"T::test_bnb_optim_0": "x", "T::test_steps": "y"}).explain(REASONS)[1] == ["T::test_steps"]


def test_arguments_keep_what_they_set(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    options = {"save_steps": 7, "eval_steps": 7, "eval_strategy": "steps", "load_best_model_at_end": True}
    theirs = TrainingArguments(str(tmp_path), learning_rate=0.3, report_to="none", **options)
    ours = convert(theirs)
    assert (ours.save_steps, ours.learning_rate, ours.logging_steps) == (7, 0.3, 500)
    assert ours.metric_for_best_model == "loss" and ours.engine == "eager" and ours.lr_scheduler_type == "linear"
