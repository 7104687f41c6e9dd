"""The counts of the loop are those of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from tests.support.tiny_run import trainer_in
from zowrap.training.config import ZOConfig
from zowrap.training.loop import acts_at_epoch_end, count_steps_per_epoch, is_something_due, make_first_state


def config(**options: Any) -> ZOConfig:
    return ZOConfig(output_dir="x", report_to="none", **options)


class Endless:
    """Batches whose number is unknown."""


def test_an_epoch_counts_updates_and_its_last_one_may_have_fewer_batches() -> None:
    assert count_steps_per_epoch(config(), range(10)) == 10
    assert count_steps_per_epoch(config(gradient_accumulation_steps=4), range(10)) == 3
    assert count_steps_per_epoch(config(gradient_accumulation_steps=4), range(2)) == 1
    assert count_steps_per_epoch(config(), Endless()) is None


def test_batches_are_made_only_where_the_length_of_the_run_depends_on_them() -> None:
    def refuse() -> None:
        raise AssertionError("the batches were made")

    assert make_first_state(config(max_steps=7), refuse).max_steps == 7
    assert make_first_state(config(num_train_epochs=2.5), lambda: range(10)).max_steps == 25
    assert make_first_state(config(), Endless).max_steps == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 24, "eval_steps": 5}, marks=pytest.mark.slow),
        {"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 3},
        {"max_steps": 24, "save_steps": 0.5, "logging_steps": 0.3},
    ],
)
def test_the_first_state_is_the_trainers_own(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = trainer_in(tmp_path, **options)
    first = make_first_state(trainer.args, trainer.get_train_dataloader)
    trainer.train()
    for name in ("max_steps", "logging_steps", "eval_steps", "save_steps", "train_batch_size"):
        assert getattr(first, name) == getattr(trainer.state, name), name
    assert first.global_step == 0 and trainer.state.global_step == first.max_steps


def test_evaluations_checkpoints_and_the_end_are_due() -> None:
    state = TrainerState(max_steps=10, eval_steps=3, save_steps=4)

    def due(**options: Any) -> list[int]:
        args = config(**{"save_strategy": "no", "eval_strategy": "no", **options})
        return [step for step in range(1, 11) if is_something_due(args, step, state)]

    assert due() == [10]
    assert due(eval_strategy="steps") == [3, 6, 9, 10]
    assert due(save_strategy="steps") == [4, 8, 10]
    assert due(eval_strategy="steps", save_strategy="steps") == [3, 4, 6, 8, 9, 10]
    assert due(save_strategy="epoch") == due(eval_strategy="epoch") == list(range(1, 11))


def test_epochs_end_with_something_due_only_where_a_strategy_says_so() -> None:
    assert not acts_at_epoch_end(config(eval_strategy="steps"))
    assert acts_at_epoch_end(config(eval_strategy="epoch")) and acts_at_epoch_end(config(save_strategy="epoch"))
