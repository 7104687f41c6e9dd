"""Recorded steps: a trace of every tensor operation stands in for a CUDA graph, and keeps what Python knew as it was.

Whatever a step takes from Python, its number above all, is a constant of the trace: a replay that equals the step as it
runs, for many steps, batches and settings, has taken all of it from tensors.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import zowrap
from tests.support.slow import slow_except
from tests.support.uncompiled import compile_nothing
from zowrap import rules
from zowrap.errors import ZOWarning
from zowrap.model import cuda_graphs
from zowrap.quant.layers import Int8Linear
from zowrap.training.config import ZOConfig
from zowrap.training.trainer import ZOTrainer


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.inner(self.norm(x)))


class Words(nn.Module):
    """A small language model: embedding, layers, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(60, 16), nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(16, 60, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    chosen = model(batch["ids"]).log_softmax(-1).gather(-1, batch["ids"].unsqueeze(-1))
    return -chosen.squeeze(-1).mean(-1)


def wrapped(**options: Any) -> zowrap.ZOModel:
    torch.manual_seed(0)
    given: dict[str, Any] = {"rule": "zo_sgd", "lr": 1e-3, "engine": "compiled", **options}
    return zowrap.zo_wrap(Words().eval(), loss_fn=loss, **given)


def batch_of(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids}


def by_tracing(zm: zowrap.ZOModel) -> cuda_graphs.Capture:
    """Unlike a CUDA graph a trace executes what it records: what that changed is put back."""

    def record(step: Callable[[], Any]) -> cuda_graphs.Replay:
        job = zm.job
        held = [p.tensor for p in job.parameters] + [t for s in job.states for t in s.values()]
        held += [t for tensors in job.slots.values() for t in tensors]
        before = [t.detach().clone() for t in held]

        def body() -> list[Tensor]:
            result = step()
            outputs = (result.loss, result.projected_grad, result.skipped, result.losses)
            results.extend(t.detach() for t in outputs)
            return list(outputs)

        results: list[Tensor] = []
        with torch.no_grad():
            traced = make_fx(body)()
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)

        def replay() -> None:
            with torch.no_grad():
                for tensor, value in zip(results, traced(), strict=True):
                    tensor.copy_(value)

        return replay

    return record


def recording(zm: zowrap.ZOModel) -> cuda_graphs.GraphCache:
    zm.graphs = cuda_graphs.GraphCache(zm, by_tracing(zm))
    return zm.graphs


def same(one: zowrap.ZOModel, other: zowrap.ZOModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    tensors = [(mine[k], theirs[k]) for k in mine if isinstance(mine[k], Tensor)]
    tensors += [(p.tensor, q.tensor) for p, q in zip(one.parameters, other.parameters, strict=True)]
    return all(torch.equal(a, b) for a, b in tensors) and one.step_count == other.step_count


class Waits(TorchDispatchMode):
    """What a GPU would have to be waited for: reading a number, and sizes that follow from data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


# Rules of every structure: without state, with slots, with scalars of a block, with sums over state, with state in the
# shape of a factor, with three points, and with evaluations that follow from the others.
RULES = ("zo_sgd", "zo_adam", "meazo", "conmezo", "lozo_m", "hizoo")
CASES = [
    *({"rule": rule} for rule in RULES),
    {"rule": rules.zo_sgd(conservative=True)},
    {"rule": "zo_sgd", "direction": "lowrank(2)"},
    {"rule": "zo_sgd", "direction": "sphere"},
    {"rule": "zo_sgd", "queries": 2},
    {"rule": "zo_sgd", "estimator": "forward"},
    {"rule": "zo_sgd", "blocks": "layer", "block_order": "descending"},
    {"rule": "zo_sgd", "memory": "sequential"},
    {"rule": "zo_adam", "weight_decay": 0.1},
]
# Slots, sums over state, and several blocks; the other tests here record plain zo_sgd.
BY_DEFAULT = [
    {"rule": "zo_adam"},
    {"rule": "conmezo"},
    {"rule": "zo_sgd", "blocks": "layer", "block_order": "descending"},
]


@pytest.mark.parametrize(
    "options",
    slow_except(BY_DEFAULT, CASES),
    ids=lambda o: "-".join(str(getattr(v, "name", v)) for v in o.values()),
)
def test_a_replayed_step_is_the_step(options: dict[str, Any]) -> None:
    ours, plain = wrapped(**options), wrapped(**options)
    recorder = recording(ours)
    for i in range(10):
        if i == 6:
            ours.lr = plain.lr = 3e-4
            ours.eps = plain.eps = 2e-3
        mine = ours.step(**batch_of(2, 6, seed=i))
        with Waits() as waits:
            theirs = plain.step(**batch_of(2, 6, seed=i))
        assert not waits.found or not i  # the first step captures the program
        assert mine.record() == theirs.record() and same(ours, plain)
    assert len(recorder.captured) == len(ours.job.blocks) and not recorder.failed


def test_a_step_that_is_not_finite_is_skipped_by_the_recording_itself() -> None:
    ours, plain = wrapped(rule="zo_adam"), wrapped(rule="zo_adam")
    recorder = recording(ours)
    for zm in (ours, plain):
        for i in range(4):
            if i == 3:
                zm.eps = 1e38
            result = zm.step(**batch_of(2, 6))
            assert bool(result.skipped) == (i == 3)
    assert recorder.captured and same(ours, plain)


def test_each_kind_of_batch_is_recorded_when_it_comes_again_and_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    ours, plain = wrapped(), wrapped()
    recorder = recording(ours)
    counts = []
    for length in (5, 5, 6, 7, 6, 7, 7, 5):
        ours.step(**batch_of(2, length)), plain.step(**batch_of(2, length))
        counts.append(len(recorder.captured))
    assert counts == [0, 1, 1, 1, 2, 2, 2, 2] and same(ours, plain)


def test_recordings_that_fit_no_longer_go(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = wrapped(memory="auto"), wrapped(memory="auto")
    recorder = recording(ours)
    counts = []

    def steps(count: int) -> None:
        for zm in (ours, plain):
            for i in range(count):
                zm.step(**batch_of(2, 6, seed=i))
        counts.append(len(recorder.captured))

    steps(3)
    (old,) = recorder.captured.values()
    gone = weakref.ref(old)
    del old
    for zm in (ours, plain):
        zm.load_state_dict({**zm.state_dict(), "seed": 5})
    steps(1)
    gc.collect()
    assert gone() is None
    steps(2)
    for zm in (ours, plain):
        zm.model.head.weight.data = zm.model.head.weight.data.clone()
    steps(1)
    steps(2)
    for zm in (ours, plain):
        zm.schedule.take("sequential", zm.schedule.largest)
    steps(1)
    steps(2)
    assert counts == [1, 0, 1, 0, 1, 0, 1] and same(ours, plain)


class Driver:
    """What recording asks of CUDA, without one: graphs that run nothing, in pools with numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: list[int] = []
        self.calls: list[tuple[Any, ...]] = []
        self.refuses: str | None = None
        driver, handles = self, itertools.count()

        class Graph:
            ended = False

            def replay(self) -> None: ...

            def pool(self) -> None:
                if not self.ended:
                    raise RuntimeError("called without a preceding successful capture")

        class Capture:
            def __init__(self, graph: Graph, pool: int, **_: Any) -> None:
                driver.pools.append(pool)
                self.graph = graph

            def __enter__(self) -> None:
                if driver.refuses == "begin":
                    raise RuntimeError("capture refused")

            def __exit__(self, *_: Any) -> None:
                if driver.refuses == "end":
                    raise RuntimeError("operation failed due to a previous error during capture")
                self.graph.ended = True

        fakes = {"device": lambda _: contextlib.nullcontext(), "Stream": lambda _: "ours", "CUDAGraph": Graph}
        fakes |= {"graph_pool_handle": lambda: next(handles), "current_stream": lambda _: "theirs", "graph": Capture}
        fakes |= {"set_stream": lambda stream: driver.calls.append(("stream", stream)), "current_device": lambda: 3}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *given, name=name: driver.calls.append((name, *given)))

    def fails(self, step: Callable[[], Any]) -> list[tuple[Any, ...]]:
        """What is called after a recording that fails, behind the stream that was current before."""
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            cuda_graphs.cuda_graph(torch.device("cuda"))(step)
        (stream, *rest), self.calls = self.calls, []
        assert stream == ("stream", "theirs")
        return rest


def test_graphs_share_a_pool_until_the_last_one_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    record = cuda_graphs.cuda_graph(torch.device("cuda"))
    kept = [record(lambda: None), record(lambda: None)]
    first = driver.pools[0]
    assert driver.pools == [first, first]
    del kept[0]
    kept.append(record(lambda: None))
    assert driver.pools[-1] == first
    kept.clear()
    kept.append(record(lambda: None))
    kept.append(record(lambda: None))
    assert first != driver.pools[-1] == driver.pools[-2]


def test_a_capture_that_broke_off_leaves_nothing_in_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_broken", [])
    driver = Driver(monkeypatch)
    driver.refuses = "end"

    def undone() -> list[tuple[Any, ...]]:
        return [(name, 3, driver.pools[-1]) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool")]

    for version in ("2.11.0+cu130", "2.13.0"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert driver.fails(lambda: None) == undone()
        assert driver.fails(lambda: 1 / 0) == undone()  # whose error the end of the capture hides

    def ended_already(*given: Any) -> None:
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended_already)
    assert driver.fails(lambda: None) == undone()[1:]
    assert len(cuda_graphs._broken) == 5
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.0"))
    assert driver.fails(lambda: None) == []


def test_a_capture_that_ended_or_never_began_is_torchs_own_to_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    assert driver.fails(lambda: 1 / 0) == []
    driver.refuses = "begin"
    assert driver.fails(lambda: None) == []


def test_without_the_allocators_functions_a_failed_capture_is_its_error_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_broken", [])
    driver = Driver(monkeypatch)
    driver.refuses = "end"
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name)
    assert driver.fails(lambda: None) == []


def test_accumulated_steps_run_as_they_are_and_leave_recordings_right() -> None:
    ours, plain = wrapped(), wrapped()
    recording(ours)
    for zm in (ours, plain):
        for i in range(6):
            if i % 2:
                zm.accumulate(**batch_of(2, 6, seed=1))
                zm.accumulate(**batch_of(1, 6, seed=2))
                zm.update()
            else:
                zm.step(**batch_of(2, 6, seed=i))
    assert same(ours, plain)


def test_a_recording_that_fails_leaves_the_step_as_it_was() -> None:
    ours, plain = wrapped(), wrapped()

    def refuse(step: Callable[[], Any]) -> cuda_graphs.Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder = recording(ours)
    for length in (6, 6, 7):
        ours.step(**batch_of(2, length)), plain.step(**batch_of(2, length))
    recorder.capture = refuse
    with pytest.warns(ZOWarning, match="not captured as CUDA graphs"):
        ours.step(**batch_of(2, 7))
    ours.step(**batch_of(2, 6))
    for length in (7, 6):
        plain.step(**batch_of(2, length))
    assert same(ours, plain) and not recorder.captured


class Stop(TrainerCallback):
    """A kill after the third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer_in(folder: Path, **options: Any) -> ZOTrainer:
    torch.manual_seed(0)
    given: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options}
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    args = ZOConfig(output_dir=str(folder), engine="compiled", **quiet, **given)
    rows = [{"ids": ids} for ids in batch_of(24, 6)["ids"]]
    return ZOTrainer(Words().eval(), args, train_dataset=rows, loss_fn=loss)


def replays(trainer: ZOTrainer, **options: Any) -> int:
    """Train with a recorder: how many steps were replayed ones."""
    recorder, found = recording(trainer.zm), []
    step = recorder.step
    recorder.step = lambda batch: found.append(step(batch)) or found[-1]  # type: ignore[method-assign]
    trainer.train(**options)
    assert not recorder.failed
    return sum(result is not None for result in found)


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]


@pytest.mark.slow
def test_a_training_replays_its_steps_and_goes_on_the_same(tmp_path: Path) -> None:
    plain = trainer_in(tmp_path / "plain")
    plain.train()
    ours = trainer_in(tmp_path / "ours")
    assert replays(ours) == 5  # all but the first, which compiles
    cut = trainer_in(tmp_path / "cut")
    cut.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        replays(cut)
    resumed = trainer_in(tmp_path / "cut")
    assert replays(resumed, resume_from_checkpoint=True) == 3  # of steps 3 to 6: the third is made again
    for trainer, folder in ((ours, "ours"), (resumed, "cut")):
        assert same(trainer.zm, plain.zm) and journal(tmp_path / folder) == journal(tmp_path / "plain")


def test_a_training_step_of_several_micro_batches_runs_as_it_is(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    plain, ours = trainer_in(tmp_path / "plain", **options), trainer_in(tmp_path / "ours", **options)
    plain.train()
    assert replays(ours) == 0 and same(ours.zm, plain.zm)


def test_reading_a_number_counts_as_waiting() -> None:
    with Waits() as waits:
        float(torch.ones(()))
    assert waits.found


def test_a_model_that_branches_on_values_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of one kind may need different programs."""

    def forward(self: Words, ids: Tensor, plain: Callable[[Words, Tensor], Tensor] = Words.forward) -> Tensor:
        return plain(self, ids) * (2.0 if (ids == 0).any() else 1.0)

    monkeypatch.setattr(Words, "forward", forward)
    one, other = wrapped(), wrapped()
    cache = recording(one)
    for ids in (torch.ones(2, 5), torch.ones(2, 5), torch.zeros(2, 5), torch.ones(2, 5)):
        one.step(ids=ids.long())
        other.step(ids=ids.long())
    assert not cache.captured and not cache.failed and same(one, other)


def test_thresholds_that_are_renewed_on_some_steps_are_not_recorded() -> None:
    assert cuda_graphs.can_be_captured(wrapped()) and not cuda_graphs.can_be_captured(wrapped(rule="sparse_mezo"))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bit_layers_that_look_for_large_columns_are_not_recorded(threshold: float) -> None:
    zm = wrapped()
    layer = Int8Linear.__new__(Int8Linear)
    nn.Module.__init__(layer)
    layer.threshold = threshold
    zm.model.layers[0].inner = layer
    assert cuda_graphs.can_be_captured(zm) is (threshold == 0)


def test_a_cpu_records_nothing() -> None:
    assert wrapped().graphs is None
