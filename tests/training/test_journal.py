"""The journal: what is written can be read back exactly, a torn end is ignored, another run's is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zowrap
from tests.support.tiny_run import tiny_llama
from zowrap.errors import ZOError
from zowrap.storage.lines import Lines
from zowrap.training.journal import Journal, describe, fingerprint


def record(step: int, loss: float = 1.5) -> dict:
    return {"step": step, "loss": loss, "losses": [loss, 1.25], "projected_grad": [0.5], "lr": 0.1, "skipped": False}


def journal_with(path: Path, steps: int) -> Journal:
    journal = Journal.start(path, {"journal": 1, "seed": 3})
    for step in range(steps):
        journal.append(record(step))
    journal.close()
    return journal


@settings(suppress_health_check=[HealthCheck.too_slow])  # which a busy machine is
@given(st.lists(st.floats(width=32), min_size=1, max_size=4))
def test_every_float32_comes_back_exactly_and_what_is_not_finite_as_nan(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal.start(path, {"journal": 1})
    journal.append({"step": 0, "losses": values, "projected_grad": values})
    (back,) = journal.records()
    for value, read in zip(values, back["losses"], strict=True):
        assert read == value if math.isfinite(value) else math.isnan(read)


@pytest.mark.parametrize("kept", [1, 5, 30])
def test_a_torn_last_line_is_ignored_and_cut(tmp_path, kept):
    path = tmp_path / "journal.jsonl"
    journal_with(path, 3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-kept])
    journal = Journal.read_from(path)
    assert journal is not None and journal.steps() == 2
    journal.keep(2)
    journal.append(record(2))
    assert path.read_bytes() == whole


def test_a_torn_header_is_no_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"journal": 1, "se')
    assert Journal.read_from(path) is None


def test_a_damaged_line_in_the_middle_is_told_with_its_number(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal_with(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{oops\n", *lines[2:]]))
    with pytest.raises(ZOError, match="line 3"):
        Journal.read_from(path).steps()


def test_a_missing_step_is_told(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = journal_with(path, 2)
    journal.append(record(4))
    assert journal.steps() == 5
    with pytest.raises(ZOError, match="no record of step 2"):
        list(journal.records())
    assert [r["step"] for r in journal.records(after=4)] == [4]


def test_keep_cuts_later_steps_and_nothing_else(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal_with(tmp_path / "short.jsonl", 2)
    journal_with(path, 5).keep(2)
    assert path.read_bytes() == (tmp_path / "short.jsonl").read_bytes()
    journal = Journal.read_from(path)
    journal.keep(99)
    assert path.read_bytes() == (tmp_path / "short.jsonl").read_bytes()


def wrapped(**options):
    return zowrap.zo_wrap(tiny_llama(options.pop("model_seed", 0)), engine="eager", **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed=0"),
        ({"rule": "zo_sgd"}, "rule='meazo'"),
        ({"rule": zowrap.rules.meazo(beta=0.5)}, "hyper="),
        ({"direction": "rademacher"}, "direction='gaussian'"),
        ({"queries": 2}, "queries=1"),
        ({"trainable": ["*mlp*"]}, "model.embed_tokens.weight moves"),
    ],
)
def test_the_journal_of_another_run_is_refused_with_the_difference(tmp_path, options, named):
    path = tmp_path / "journal.jsonl"
    Journal.start(path, describe(wrapped()))
    with pytest.raises(ZOError, match="another run") as error:
        Journal.resume(path, describe(wrapped(**options)))
    assert named in str(error.value)


def test_the_same_run_is_recognised_whatever_its_weights_are_by_now(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal.start(path, describe(wrapped()))
    assert Journal.resume(path, describe(wrapped(model_seed=5))) is not None
    assert fingerprint(wrapped()) == fingerprint(wrapped()) != fingerprint(wrapped(model_seed=5))


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(ZOError, match=r"disk is full.*/dev/full"):
        Lines(full).append({"step": 1})


def test_a_part_written_on_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    import errno
    import os

    path = tmp_path / "journal.jsonl"
    journal = journal_with(path, 2)
    before, write = path.read_bytes(), os.write

    def refuse(file, data, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, "full")
        return write(file, data[:7])

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(ZOError, match="disk is full"):
        journal.append(record(2))
    assert path.read_bytes() == before


def test_lines_are_json_that_any_reader_takes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Lines(path).append({"step": 1, "loss": math.nan})
    assert "NaN" not in path.read_text() and json.loads(path.read_text()) == {"step": 1, "loss": None}
