"""The runner of the Trainer's own tests, on a checkout of a few tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.external.trainer_suite import REASONS, Outcome, find_unused, substitute

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

    def test_arguments_alone(self):
        options = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 7, "logging_steps": 7}
        args = TrainingArguments("out", learning_rate=0.3, **options)
        self.assertEqual((args.save_steps, args.eval_steps, args.learning_rate), (7, 7, 0.3))
        self.assertEqual((args.metric_for_best_model, args.lr_scheduler_type), ("loss", "linear"))

    def test_that_makes_neither(self):
        self.assertTrue(issubclass(Trainer, object))

    def test_fails_with_both(self):
        self.fail("not here")

    @unittest.skip("needs a GPU")
    def test_that_is_skipped(self):
        pass

    def test_that_has_no_reason(self):
        self.assertFalse(hasattr(Trainer, "wrap"), "this is another trainer")
"""


@pytest.mark.slow
def test_a_suite_is_counted_against_what_the_trainer_passes(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "trainer"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "test_trainer_tiny.py").write_text(SUITE)
    (folder / "test_trainer_distributed.py").write_text("raise AssertionError('needs several processes')")
    command = [sys.executable, "-m", "tests.external.trainer_suite", str(tmp_path), "--list", "--table"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 1
    lines = told.stdout.splitlines()
    counts = [line.split("|")[2].strip() for line in lines[2:8]]
    assert counts == ["6", "4", "1", "1", "1", "2"]
    assert sum(line.startswith("| `test_bnb_optim_sgd` | it chooses an optimiser") for line in lines) == 1
    lines = [line for line in lines if line and not line.startswith("|")]
    assert lines[0].startswith("rightly fails  TinyTest::test_bnb_optim_sgd: it chooses an optimiser")
    assert lines[1].startswith("FAILED         TinyTest::test_that_has_no_reason: AssertionError: True is not false")
    assert [line.split()[0] for line in lines[2:-1]] == ["UNUSED"] * (len(REASONS) - 1)
    assert lines[-1] == "4 of the 6 tests that the Trainer passes here pass, 1 rightly fail, 1 fail without a reason"
    command[3] = str(folder)
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 1 and "is no checkout of transformers" in told.stderr


def test_an_outcome_is_limited_to_what_the_trainer_passes() -> None:
    outcome = Outcome(["a", "b"], {"c": "wrong", "d": "wrong"}).limit_to(["a", "c", "e"])
    assert outcome == Outcome(["a"], {"c": "wrong", "e": "it did not run"})
    assert Outcome([], {"T::test_bnb_optim_0": "x", "T::test_steps": "y"}).explain(REASONS)[1] == ["T::test_steps"]


def test_a_reason_that_explains_nothing_is_found() -> None:
    assert find_unused([]) == list(REASONS)
    assert r"TrainerNEFTuneTest::test_neftune$" not in find_unused(["TrainerNEFTuneTest::test_neftune"])


def test_what_was_substituted_comes_back(tmp_path: Path) -> None:
    from zowrap.training.config import ZOConfig
    from zowrap.training.trainer import ZOTrainer

    made: list[int] = []
    with substitute(lambda: made.append(1)):
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments(str(tmp_path), report_to="none", learning_rate=0.3)
        assert issubclass(Trainer, ZOTrainer) and isinstance(args, ZOConfig) and made == [1]
        assert (args.learning_rate, args.logging_steps, args.engine) == (0.3, 500, "eager")
    from transformers import Trainer, TrainingArguments

    assert not issubclass(Trainer, ZOTrainer) and not issubclass(TrainingArguments, ZOConfig)


def test_the_page_gives_every_reason() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    assert [why for why in REASONS.values() if f"| {why} |" not in page] == []
