"""A run on the disk: killed and resumed it is the uninterrupted run, bitwise, and no file of it is a pickle."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.support.slow import slow_except
from tests.support.tiny_run import same_weights, tiny_llama, trainer_in, weights_of
from zowrap.errors import ZOError
from zowrap.training.replay import replay_run
from zowrap.training.run_folder import Run


def in_child(work) -> int:
    """Run ``work()`` in a forked child and return the child's process id at once."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def finish(child: int) -> int:
    """The child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, resume: bool = False, **options) -> dict:
    trainer = trainer_in(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    facts = {"resumed_from": trainer.resumed_from, "interrupted": trainer.interrupted, "best": trainer.best_step}
    (folder / "result.txt").write_text(json.dumps(facts))
    return facts


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert same_weights(one, other), "the model in the root differs"
    assert (one / "journal.jsonl").read_bytes() == (other / "journal.jsonl").read_bytes()
    assert metrics(one) == metrics(other)
    assert Run(one).checkpoints() == Run(other).checkpoints()
    for step in Run(one).checkpoints():
        assert same_weights(Run(one).checkpoint(step), Run(other).checkpoint(step))
    status = [Run(folder).status() for folder in (one, other)]
    assert status[0] == status[1] and status[0]["state"] == "finished"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(in_child(lambda: train(folder))) == 0
    return folder


def kill_and_resume(folder: Path, moments: list[int]) -> None:
    """Start, kill when the journal has reached each of these numbers of steps, resume, and at last let it finish."""
    for number, steps in enumerate([*moments, None]):
        before = recorded(folder)
        callbacks = [] if steps is None else [WaitsForItsEnd()]
        child = in_child(lambda resume=number > 0, given=callbacks: train(folder, resume, callbacks=given))
        if steps is not None:
            # A line more than there were: the resumed run has then come as far as its loop.
            while recorded(folder) < max(steps, before + 1):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
                time.sleep(0.0005)
            os.kill(child, signal.SIGKILL)
            assert finish(child) == -signal.SIGKILL
        else:
            assert finish(child) == 0


def recorded(folder: Path) -> int:
    """Whole lines of the journal after the first; a torn one does not count."""
    journal = folder / "journal.jsonl"
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.is_file() else 0


def test_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(whole, tmp_path):
    kill_and_resume(tmp_path, sorted(random.Random(0).sample(range(1, 16), 3)))
    assert json.loads((tmp_path / "result.txt").read_text())["resumed_from"] > 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole, tmp_path):
    generator = random.Random(1)
    for repeat in range(20):
        folder = tmp_path / str(repeat)
        folder.mkdir()
        kill_and_resume(folder, [generator.randint(1, 16)])
        assert_same_run(folder, whole)


class WaitsForItsEnd(TrainerCallback):
    """However late the process that kills a run comes to it, the run is not at its end."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(60 if state.global_step >= 20 else 0.005)


def die_at(operation: int) -> None:
    """Kill this process right before its ``operation``-th move or write of a file in Python."""
    count = [0]

    def counted(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.write = counted(os.replace), counted(os.write)


def killed_at(folder: Path, operation: int) -> bool:
    """Whether a run that is to die at that operation died; it is then resumed to its end, or begun if there is none."""

    def work():
        die_at(operation)
        train(folder)

    died = finish(in_child(work)) == -signal.SIGKILL
    begun = Run(folder).config_file.is_file()
    assert finish(in_child(lambda: train(folder, resume=begun))) == 0
    return died


@pytest.mark.parametrize("operation", slow_except([2, 33, 57], [2, 7, 11, 33, 48, 57]))
def test_killed_between_any_two_writes_and_resumed_is_the_uninterrupted_run(whole, tmp_path, operation):
    assert killed_at(tmp_path, operation)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_before_each_write_in_turn(whole, tmp_path):
    for operation in range(1, 400, 3):
        folder = tmp_path / str(operation)
        folder.mkdir()
        if not killed_at(folder, operation):
            return
        assert_same_run(folder, whole)
    pytest.fail("the run never ended")


def test_resumed_from_says_where_and_no_step_of_the_journal_is_lost(tmp_path):
    trainer = trainer_in(tmp_path, eval_dataset=None, save_strategy="no")
    stop_after(trainer, 11)
    trainer.train()
    assert Run(tmp_path).recorded_steps() == 11
    for step in Run(tmp_path).checkpoints():
        shutil.rmtree(Run(tmp_path).checkpoint(step))
    again = trainer_in(tmp_path, eval_dataset=None, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 11


def stop_after(trainer, step: int, number: int = signal.SIGTERM) -> None:
    """Have a signal arrive during that step."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), number)

    trainer.add_callback(Signal())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_the_rest_is_the_same_run(whole, tmp_path, number, capfd):
    handler = signal.getsignal(number)
    trainer = trainer_in(tmp_path)
    stop_after(trainer, 10, number)
    trainer.train()
    assert trainer.interrupted and trainer.state.global_step == 10
    assert Run(tmp_path).checkpoints() == [10] and Run(tmp_path).status()["state"] == "interrupted"
    assert signal.getsignal(number) is handler
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert not again.interrupted and again.resumed_from == 10
    assert_same_run(tmp_path, whole)


def test_a_signal_during_an_evaluation_loses_nothing(whole, tmp_path):
    class Stop(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 12:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_in(tmp_path, callbacks=[Stop()])
    trainer.train()
    assert trainer.interrupted
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert 0 < again.resumed_from <= 12
    assert_same_run(tmp_path, whole)


def test_resume_of_a_finished_run_changes_nothing_and_loads_the_weights(whole, capfd):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    trainer = trainer_in(whole)
    output = trainer.train(resume_from_checkpoint=True)
    assert output.global_step == 24 and "finished" in capfd.readouterr().err
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    stored = weights_of(Run(whole).checkpoint(24))
    for name, tensor in trainer.model.state_dict().items():
        key = f"model.safetensors/{name}"
        assert key not in stored or stored[key].equal(tensor)


def test_resume_with_nothing_there_is_refused_as_the_trainer_refuses_it(tmp_path):
    with pytest.raises(ZOError, match="No valid checkpoint found in output directory"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_ahead_of_its_journal_is_gone_on_from(whole, tmp_path):
    trainer = trainer_in(tmp_path)
    stop_after(trainer, 10)
    trainer.train()
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:6]))
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 10 and same_weights(tmp_path, whole)


@pytest.mark.slow
def test_schedules_accumulation_and_rule_state_survive_a_kill(tmp_path):
    options = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "gradient_accumulation_steps": 3,
        "rule": "zo_sgd",
        "rule_options": {"momentum": 0.9},
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "queries": 2,
        "save_steps": 5,
    }
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    assert finish(in_child(lambda: train(one, **options))) == 0

    def work():
        die_at(31)
        train(other, **options)

    assert finish(in_child(work)) == -signal.SIGKILL
    assert finish(in_child(lambda: train(other, resume=True, **options))) == 0
    assert json.loads((other / "result.txt").read_text())["resumed_from"] > 0
    assert_same_run(one, other)


def test_records_that_wait_on_an_accelerator_are_flushed_in_time_and_survive_a_kill(whole, tmp_path):
    def work(resume, die=None):
        class Watch(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                trainer._writer.flush_steps = 50  # as on an accelerator

            def on_step_end(self, args, state, control, **kwargs):
                held = Run(tmp_path).recorded_steps()
                assert held >= (state.global_step - 1) // 3 * 3  # an evaluation every three steps completes the journal
                if state.global_step == die:
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer = trainer_in(tmp_path, logging_steps=24, callbacks=[Watch()])
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.resumed_from > 0 or not resume

    assert finish(in_child(lambda: work(False, die=11))) == -signal.SIGKILL
    assert Run(tmp_path).recorded_steps() == 9
    assert finish(in_child(lambda: work(True))) == 0
    assert_same_run(tmp_path, whole)


def test_a_resumed_run_takes_the_thread_count_it_began_with(tmp_path, capfd):
    threads = torch.get_num_threads()
    trainer = trainer_in(tmp_path, max_steps=8)
    stop_after(trainer, 4)
    trainer.train()
    try:
        torch.set_num_threads(threads + 1)
        trainer_in(tmp_path, max_steps=8).train(resume_from_checkpoint=True)
        assert torch.get_num_threads() == threads and f"{threads} threads" in capfd.readouterr().err
    finally:
        torch.set_num_threads(threads)


def test_a_resume_from_one_checkpoint_takes_the_thread_count_too(tmp_path, capfd):
    threads = torch.get_num_threads()
    train(tmp_path / "one", max_steps=8, save_total_limit=0)
    checkpoint = Run(tmp_path / "one").checkpoint(4)
    for folder in ("one", "other"):
        try:
            torch.set_num_threads(threads + 1)
            trainer = trainer_in(tmp_path / folder, max_steps=8, save_total_limit=0)
            trainer.train(resume_from_checkpoint=str(checkpoint))
            assert torch.get_num_threads() == threads and f"{threads} threads" in capfd.readouterr().err
        finally:
            torch.set_num_threads(threads)
        header = json.loads((tmp_path / folder / "journal.jsonl").read_text().splitlines()[0])
        assert header["environment"]["threads"] == threads and header["environment"]["engine"] == "eager"


@pytest.mark.parametrize("of_one_checkpoint", [False, True])
def test_a_run_that_fell_back_to_eager_stays_eager(whole, tmp_path, monkeypatch, capfd, of_one_checkpoint):
    from zowrap.engines import captures, compile_time
    from zowrap.errors import ZOCaptureError

    def no_compiler(*args, **kwargs):
        raise ZOCaptureError("there is no C++ compiler")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="running eagerly"):
        patch.setattr(compile_time, "COMPILE_PLAIN_SECONDS", 0.0)  # it is to be compiled, however few its steps
        patch.setattr(captures, "capture", no_compiler)
        trainer = trainer_in(tmp_path, engine=None)
        stop_after(trainer, 10)
        trainer.train()
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[0])["environment"]["engine"] == "eager"
    again = trainer_in(tmp_path, engine=None)
    again.train(resume_from_checkpoint=str(Run(tmp_path).checkpoint(10)) if of_one_checkpoint else True)
    assert again.zm.inspect().engine == "eager" and "the eager engine, as the run began" in capfd.readouterr().err
    assert_same_run(tmp_path, whole)


def test_another_engine_than_the_runs_is_told(tmp_path, capfd):
    trainer = trainer_in(tmp_path, max_steps=8)
    stop_after(trainer, 4)
    trainer.train()
    journal = tmp_path / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"engine": "eager"', '"engine": "compiled"'))
    trainer_in(tmp_path, max_steps=8).train(resume_from_checkpoint=True)
    assert "began with engine compiled, now it is eager" in capfd.readouterr().err


@pytest.mark.slow
def test_the_compiled_engine_goes_on_bitwise(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    trainer_in(one, engine="compiled").train()
    trainer = trainer_in(other, engine="compiled")
    stop_after(trainer, 10)
    trainer.train()
    again = trainer_in(other, engine="compiled")
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 10
    assert_same_run(one, other)


@pytest.mark.slow
def test_bfloat16_weights_survive_a_kill(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()

    def work(folder, resume=False, die=None):
        if die:
            die_at(die)
        trainer = trainer_in(folder, tiny_llama().to(torch.bfloat16))
        trainer.train(resume_from_checkpoint=resume)

    assert finish(in_child(lambda: work(one))) == 0
    assert finish(in_child(lambda: work(other, die=40))) == -signal.SIGKILL
    assert finish(in_child(lambda: work(other, resume=True))) == 0
    assert_same_run(one, other)


def test_only_safetensors_json_and_text_are_ever_written(whole):
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.suffix in {".safetensors", ".json", ".jsonl", ".txt"}, path
            assert path.read_bytes()[:1] != b"\x80", f"{path} starts like a pickle"


def test_configuration_and_settings_are_there_before_the_first_step(tmp_path):
    seen = []
    trainer = trainer_in(tmp_path, eval_dataset=None)
    accumulate = trainer.zm.accumulate

    def look(**batch):
        seen.append({path.name for path in tmp_path.iterdir()})
        return accumulate(**batch)

    trainer.zm.accumulate = look
    trainer.train()
    assert {"zowrap.json", "config.json", "generation_config.json", "journal.jsonl"} <= seen[0]
    assert "model.safetensors" not in seen[0]


def test_at_most_one_checkpoint_stays_beside_the_best_model(whole):
    assert Run(whole).checkpoints() == [24]
    assert weights_of(whole) and Run(whole).status()["best_step"] is not None


def test_the_root_holds_the_best_model_by_evaluation(whole):
    lines = {line["step"]: line["eval_loss"] for line in metrics(whole) if "eval_loss" in line}
    best = Run(whole).status()["best_step"]
    assert lines[best] == min(lines.values()) and 0 in lines and len(lines) >= 9


def test_base_weights_and_journal_alone_give_the_last_weights(whole, tmp_path):
    zm = replay_run(tiny_llama(), whole, tmp_path / "replayed")
    assert zm.step_count == 24
    stored, replayed = weights_of(Run(whole).checkpoint(24)), weights_of(tmp_path / "replayed")
    assert all(tensor.equal(stored[name]) for name, tensor in replayed.items())


def test_replay_from_other_weights_is_refused(whole):
    with pytest.raises(ZOError, match="other weights"):
        replay_run(tiny_llama(seed=9), whole)
    with pytest.raises(ZOError, match="no journal"):
        replay_run(tiny_llama(), whole / "nowhere")


def test_resume_from_the_journal_with_other_base_weights_is_refused(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no", eval_dataset=None)
    stop_after(trainer, 5)
    trainer.train()
    shutil.rmtree(Run(tmp_path).checkpoint(5))
    with pytest.raises(ZOError, match="other weights"):
        trainer_in(tmp_path, tiny_llama(seed=9)).train(resume_from_checkpoint=True)


def test_another_run_in_the_folder_is_not_overwritten(whole, tmp_path):
    with pytest.raises(ZOError, match="already holds a run"):
        trainer_in(whole).train()
    with pytest.raises(ZOError, match="another run: it was written with seed=7"):
        trainer_in(whole, seed=8).train(resume_from_checkpoint=True)


def test_overwrite_starts_over(whole, tmp_path):
    train(tmp_path, max_steps=5)
    train(tmp_path, overwrite=True)
    assert_same_run(tmp_path, whole)


def test_a_full_disk_is_one_sentence_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    from zowrap.training import run_folder as module

    save, calls = module.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ZOError, match=r"disk is full: .*checkpoint-9"):
        trainer_in(tmp_path).train()
    assert Run(tmp_path).checkpoints() == [6] and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    trainer = trainer_in(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from == 8


def test_a_checkpoint_keeps_apart_whatever_its_weight_file_does_not_hold_bit_for_bit(tmp_path, monkeypatch):
    from zowrap.training import run_folder
    from zowrap.training.checkpoint import find_unsaved

    trainer = trainer_in(tmp_path / "run", rule="zo_sgd", rule_options={"momentum": 0.9}, learning_rate=1e-4)
    save, given = run_folder.save_file, {}

    def seen(tensors, *args, **kwargs):
        given.update(tensors)
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(run_folder, "save_file", seen)
    state = trainer.zm.state_dict()
    monkeypatch.setattr(trainer.zm, "state_dict", lambda: state)
    slots = {name: value for name, value in state.items() if name.startswith("slots/")}
    Run(tmp_path).save_checkpoint(0, trainer.zm, {})
    assert slots and not any(name.startswith("weights/") for name in given)
    assert all(given[name].data_ptr() == value.data_ptr() for name, value in slots.items()), "copied for nothing"

    parameter = next(p for p in trainer.zm.parameters if p.tensor.ndim == 2)
    assert find_unsaved(trainer.zm, Run(tmp_path).checkpoint(0)) == []
    with torch.no_grad():
        parameter.tensor[-1, -1] = -parameter.tensor[-1, -1]
    unsaved = find_unsaved(trainer.zm, Run(tmp_path).checkpoint(0))
    assert [trainer.zm.parameters[i] for i in unsaved] == [parameter]


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    train(tmp_path, max_steps=4)
    for name in ("zo_state.safetensors", "model.safetensors"):
        file = Run(tmp_path).checkpoint(4) / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        trainer = trainer_in(tmp_path, max_steps=8)
        with pytest.raises(ZOError, match=f"{name} is not a complete safetensors file"):
            trainer.train(resume_from_checkpoint=True)
        file.write_bytes(content)


def test_going_back_to_an_older_checkpoint_drops_what_came_after(tmp_path, whole):
    train(tmp_path, save_total_limit=0)
    assert Run(tmp_path).checkpoints() == [3, 6, 9, 12, 15, 18, 21, 24]
    trainer = trainer_in(tmp_path, save_total_limit=0)
    trainer.train(resume_from_checkpoint=str(Run(tmp_path).checkpoint(9)))
    assert trainer.resumed_from == 9 and same_weights(tmp_path, whole)
    assert Run(tmp_path).recorded_steps() == 24


def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path, whole):
    trainer = trainer_in(tmp_path, tiny_llama(hidden_size=32))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ZOError, match="another model"):
        trainer.train(resume_from_checkpoint=str(Run(whole).checkpoint(24)))
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())


def test_an_adapter_run_keeps_and_resumes_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    one, other = tmp_path / "one", tmp_path / "other"
    trainer_in(one, model()).train()
    trainer = trainer_in(other, model())
    stop_after(trainer, 10)
    trainer.train()
    again = trainer_in(other, model(), load_best_model_at_end=True)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == 10
    assert_same_run(one, other)
    assert (one / "adapter_model.safetensors").is_file() and not (one / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), one)
    mine = dict(again.model.state_dict())
    assert all(tensor.equal(mine[name]) for name, tensor in loaded.state_dict().items())
