"""The environment of a run, and what is said where it has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zowrap
from tests.support.plain_run import loss_of, make_batch
from zowrap.training.environment import describe_environment, say_differences


def test_engine_and_schedule_are_known_after_the_first_step() -> None:
    zm = zowrap.zo_wrap(nn.Linear(4, 1), loss_fn=loss_of, engine="eager")
    before = describe_environment(zm)
    assert before == {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
    zm.step(**make_batch(0))
    after = describe_environment(zm)
    assert after.items() > before.items() and after.keys() - before.keys() == {"engine", "memory"}
    assert after["engine"] == "eager"


def test_what_has_changed_is_said_of_the_facts_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    now = {"torch": "2", "device": "cpu", "threads": 4}
    say_differences({"torch": "1", "device": "cpu", "threads": 3}, now, ("torch", "device"))
    told = capsys.readouterr()
    assert told.out == "" and told.err == (
        "the run began with torch 1, now it is 2: later steps may differ in last bits\n"
    )
    say_differences({}, now, ("torch", "device", "threads"))  # a run killed before its first step knows no more
    assert capsys.readouterr().err == ""
