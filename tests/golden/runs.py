"""How each kind of configuration runs: by steps, by losses that are given, by the trainer, by the command line.

Only what users have is used: the wrapped model, the trainer, the command line and the files of a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

import zowrap
from tests.golden import models
from tests.golden.digest import Outcome
from tests.support.crash import CrashAfter

STEPS = 25
Run = Callable[[Path], Outcome]

# What a journal says of a run and of a step that is no matter of time, place or machine.
_HEADER = ("seed", "rule", "hyper", "direction", "queries", "estimator", "blocks", "block_order", "weights")
_RECORD = ("step", "seed", "lr", "eps", "weight_decay", "weights", "loss", "losses", "projected_grad", "skipped")
_STATE = ("rule", "step", "seed", "direction", "estimator", "queries", "blocks", "block_order", "along", "lr", "eps",
          "weight_decay")  # fmt: skip


def run(configuration: Run, folder: Path) -> Outcome:
    """Run a configuration on one thread and in silence, in an empty folder."""
    threads, verbosity, told = torch.get_num_threads(), transformers_logging.get_verbosity(), io.StringIO()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            warnings.simplefilter("ignore")
            return configuration(folder)
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)


# --- steps ----------------------------------------------------------------------------------------------------------


def run_steps(
    model: str,
    rule: Any,
    engine: str = "eager",
    *,
    dtype: torch.dtype = torch.float32,
    scheme: str | None = None,
    micro_batches: int = 1,
    save: bool = False,
    schedule: Callable[[int], float] | None = None,
    resume_at: int | None = None,
    replay: bool = False,
    **options: Any,
) -> Run:
    """Twenty-five steps of ``zo_wrap(model, rule, …)``.

    Args:
        scheme: quantise the model; ``model`` is then "wide opt".
        micro_batches: of each step, by ``accumulate`` and ``update``.
        save: write the model, too; its files are always those of quantised models.
        schedule: the learning rate of a step, by its number.
        resume_at: go on from this step in a new model, with the state of the first one.
        replay: make the steps once more from their records; nothing may differ.
        options: of ``zo_wrap``.
    """
    settings = {"seed": 3, "engine": engine, "memory": "paired" if engine == "compiled" else "auto", **options}
    if model == "words":
        settings = {"loss_fn": models.loss_of_words, **settings}

    def wrap(folder: Path) -> Any:
        made = models.make_quantized_model(scheme, folder / "base") if scheme else models.make_model(model, dtype)
        return zowrap.zo_wrap(made, rule, **settings)

    def configuration(folder: Path) -> Outcome:
        zm = wrap(folder)
        start, records = _weights(zm), []
        for step in range(STEPS):
            if step == resume_at:
                zm = _resumed(zm, wrap(folder))
            if schedule is not None:
                zm.lr = schedule(step)
            for part in range(1, micro_batches):
                zm.accumulate(**models.make_batch(model, 100 * part + step))
            batch = models.make_batch(model, step)
            if micro_batches > 1:
                zm.accumulate(**batch)
            records.append((zm.update() if micro_batches > 1 else zm.step(**batch)).record())
        assert zm.inspect().engine == engine
        last = float(zm.loss(**models.make_batch(model, 2)))
        outcome = _outcome(zm, start, records, last)
        if save or scheme:
            zm.save_pretrained(str(folder / "saved"))
            outcome.parts["files"] = _tensors_in(folder / "saved")
        if replay:
            again = wrap(folder)
            for record in json.loads(json.dumps(records)):
                again.replay(record)
            _check_equal(_weights(zm), _weights(again), "replayed weights")
        return outcome

    return configuration


def run_given_losses(rule: Any, engine: str = "eager", *, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    """Twenty-five updates from losses that are given: noise, rule and rounding, without a forward pass."""
    settings = {"seed": 3, "eps": 2.0**-10, "lr": 2.0**-6, "engine": engine, **options}

    def configuration(folder: Path) -> Outcome:
        zm = zowrap.zo_wrap(models.make_model("words", dtype), rule, loss_fn=models.loss_of_words, **settings)
        start, draw = _weights(zm), torch.Generator().manual_seed(5)
        shape = (zm.inspect().forwards, *((4,) if settings.get("estimator") == "population" else ()))
        records = []
        for step in range(STEPS):
            unit = 2.0 ** (-24 + 3 * (step % 4))  # projected gradients of several orders of magnitude
            losses = 1 + unit * torch.randint(-1024, 1025, shape, generator=draw)
            records.append(zm.update(losses=losses).record())
        assert zm.inspect().engine == engine
        return _outcome(zm, start, records)

    return configuration


def _resumed(old: Any, new: Any) -> Any:
    new.model.load_state_dict(old.model.state_dict())
    new.load_state_dict(old.state_dict())
    return new


def _outcome(zm: Any, start: dict[str, Tensor], records: list[dict[str, Any]], last: float | None = None) -> Outcome:
    state = zm.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    end = _weights(zm)
    parts = {
        "weights": end,
        "state": {**tensors, **{name: state[name] for name in _STATE}},
        "records": [_picked(record, _RECORD) for record in records],
    }
    moved = sum(float((end[name].double() - start[name].double()).square().sum()) for name in end) ** 0.5
    assert moved > 0 and not all(record["skipped"] for record in records), "nothing moved"
    near = {"first": float(records[0]["loss"]), "moved": moved}
    if last is not None:
        parts["loss"] = last
        near["last"] = last
    return Outcome(parts, near)


def _weights(zm: Any) -> dict[str, Tensor]:
    return {parameter.name: parameter.tensor.detach().clone() for parameter in zm.parameters}


def _picked(found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _check_equal(first: dict[str, Tensor], second: dict[str, Tensor], what: str) -> None:
    differing = [n for n in first.keys() | second.keys() if n not in first or not first[n].equal(second.get(n))]
    assert not differing, f"{what} differ: {', '.join(sorted(differing))}"


# --- the files of a run ---------------------------------------------------------------------------------------------


def _tensors_in(folder: Path, pattern: str = "*.safetensors") -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob(pattern)):
        found.update({f"{file.relative_to(folder)}/{name}": tensor for name, tensor in load_file(file).items()})
    assert found, f"no weights in {folder.name}"
    return found


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _outcome_of_run(folder: Path) -> Outcome:
    """Digests of all that a run's folder holds, less times and what a machine is."""
    header, *records = _read_lines(folder / "journal.jsonl")
    evaluations = [line for line in _read_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    told = {
        **_picked(header, _HEADER),
        "masters": bool(header.get("masters")),
        "along": header.get("along") or "drawn",
    }
    near = {"first": float(records[0]["loss"]), "last:journal": sum(r["loss"] for r in records[-5:]) / 5}
    if evaluations:
        near["last:evaluation"] = evaluations[-1]["eval_loss"]
    parts = {
        "journal": [told, *(_picked(record, _RECORD) for record in records)],
        "evaluations": [_picked(line, ("step", "eval_loss", "eval_accuracy")) for line in evaluations],
        "files": _tensors_in(folder),
        "checkpoint": _tensors_in(folder, "checkpoint-*/*.safetensors"),
    }
    return Outcome(parts, near)


# --- the trainer ----------------------------------------------------------------------------------------------------


def run_trainer(
    model: str, rule: str, engine: str = "eager", *, dtype: torch.dtype = torch.float32, scheme: str | None = None,
    break_at: int | None = None, loss_fn: Any = None, **options: Any,
) -> Run:  # fmt: skip
    """Twenty-five steps of a :class:`zowrap.ZOTrainer`, evaluated and saved on the way.

    Args:
        break_at: break off after this step, tear the journal's last line, and go on with a new trainer.
        options: of ``ZOConfig``.
    """
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "seed": 7,
        "eval_steps": 10, "save_steps": 10, "report_to": "none", "disable_tqdm": True, "log_level": "error",
        "rule": rule, "engine": engine, **options,
    }  # fmt: skip
    if model == "words":
        loss_fn = loss_fn or models.loss_of_words

    def make_trainer(folder: Path, callbacks: list[TrainerCallback]) -> Any:
        made: nn.Module
        made = models.make_quantized_model(scheme, folder / "base") if scheme else models.make_model(model, dtype)
        args = zowrap.ZOConfig(output_dir=str(folder / "run"), **settings)
        rows, held_out = models.Rows(model), models.Rows(model, first=100)
        return zowrap.ZOTrainer(
            made, args, train_dataset=rows, eval_dataset=held_out, loss_fn=loss_fn, callbacks=callbacks
        )

    def configuration(folder: Path) -> Outcome:
        if break_at is None:
            make_trainer(folder, []).train()
        else:
            with contextlib.suppress(RuntimeError):
                make_trainer(folder, [CrashAfter(break_at)]).train()
            journal = folder / "run" / "journal.jsonl"
            assert len(_read_lines(journal)) <= break_at + 1
            with journal.open("a") as file:
                file.write('{"step": ')
            make_trainer(folder, []).train(resume_from_checkpoint=True)
        return _outcome_of_run(folder / "run")

    return configuration


# --- the command line -----------------------------------------------------------------------------------------------


def run_command(
    kind: str, *options: str, engine: str = "eager", task: str = "classification", then: Sequence[str] = ()
) -> Run:
    """``zowrap tune`` of twenty-five steps, ``zowrap eval`` of its result, and commands after it.

    Args:
        kind: of model, see :func:`tests.golden.models.save_model`.
        options: of ``tune``.
        then: "replay", or options of ``zowrap export``; each writes a folder.
    """

    def configuration(folder: Path) -> Outcome:
        with _inside(folder):
            models.save_model(kind, Path("model"))
            train = models.write_reviews(Path("train.jsonl"), 24, prompts=task == "lm")
            test = models.write_reviews(Path("test.jsonl"), 10, first=100, prompts=task == "lm")
            data = ("--task", task, "--data", str(train), "--eval-data", str(test))
            _command("tune", "model", "--out", "run", "--engine", engine, "--steps", str(STEPS), "--batch-size", "4",
                     "--eval-every", "10", "--save-every", "10", "--seed", "5", *data, *options)  # fmt: skip
            outcome = _outcome_of_run(Path("run"))
            told = _command("eval", "run", "--data", str(test))
            outcome.parts["eval"] = _picked(told, ("loss", "accuracy", "examples"))
            outcome.near["last:eval"] = told["loss"]
            for number, command in enumerate(then):
                to = f"written-{number}"
                if command == "replay":
                    _command("replay", "model", "run", "--to", to)
                else:
                    _command("export", "run", "--to", to, *command.split())
                outcome.parts[command] = _tensors_in(Path(to))
        return outcome

    return configuration


def _command(*arguments: str) -> dict[str, Any]:
    from zowrap.cli import main

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        code = main([*arguments, "--json"])
    answer = json.loads(told.getvalue())
    assert code == 0, f"zowrap {' '.join(arguments)}: {answer}"
    return answer


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Relative paths alone, so that no run depends on where it lies."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
