"""Each thread has its own scratch buffers, and chunks cover every row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import zowrap
from tests.support.families import batch, make
from tests.support.uncompiled import compile_nothing
from zowrap.ops import scratch


def test_a_matrix_without_rows_has_no_chunks() -> None:
    assert list(scratch.chunks(0, 7)) == [] and list(scratch.chunks(7, 0)) == [(0, 7)]


def test_threads_do_not_share_scratch() -> None:
    def own() -> int:
        return scratch.buffers("test", torch.float32, torch.device("cpu"), 1, 8)[0].data_ptr()

    with ThreadPoolExecutor(1) as pool:
        assert own() == own() != pool.submit(own).result()


def test_models_may_step_side_by_side_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models take six steps each, concurrently and then in sequence, with the same losses bit for bit."""

    def losses(zm: zowrap.ZOModel) -> list[float]:
        return [float(zm.step(**batch("opt", 4, 9, seed=i)).loss) for i in range(6)]

    def wrapped(seed: int) -> zowrap.ZOModel:
        zm = zowrap.zo_wrap(make("opt"), "zo_sgd", lr=1e-2, eps=1e-2, seed=seed, engine="compiled")
        zm.loss(**batch("opt", 4, 9))
        return zm

    compile_nothing(monkeypatch)
    alone = [losses(wrapped(seed)) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(losses, [wrapped(0), wrapped(1)])) == alone
