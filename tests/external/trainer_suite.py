"""Run the tests that transformers has for its ``Trainer``, with ``ZOTrainer`` in its place.

    python -m tests.external.trainer_suite PATH [--list] [OPTIONS OF PYTEST]

PATH is a checkout of transformers, near the installed version; the installed package is what runs, and the checkout
gives the tests. They run twice, each time in a process of its own: with the Trainer itself, which tells what can pass
on this machine at all (without a GPU, the hub, or a package), and with ``ZOTrainer`` wherever ``Trainer`` is imported.
There, ``TrainingArguments`` become a ``ZOConfig`` with what they set and the Trainer's defaults for what is due when,
since the tests count on these; a folder may be trained into again.

The exit status is 0 if every test that the Trainer passes and ours does not has its line in :data:`REASONS`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_PICKLES = "it looks for files that are pickles (optimizer.pt …): ours are safetensors and JSON"
_OPTIMISER = "it is about an optimiser of torch or another package: the update is the rule's"
_GROUPS = "it counts the optimiser's groups with and without weight decay: the rule leaves vectors out by itself"
# A pattern for names of tests (``Class::test``, without parameters) → why such a test rightly fails.
REASONS: dict[str, str] = {
    r"TrainerCheckpointSaveTest::test_save_checkpoints$": _PICKLES,
    r"TrainerBestModelTest::test_(save_best_checkpoint|load_best_model_at_end)$": _PICKLES,
    r"TrainerBestModelTest::test_best_model_checkpoint_behavior$": (
        "it counts the files of the folder: a run's holds its journal, its log and the best model as well"
    ),
    r"::test_(adafactor_lr_none|custom_optimizer|reduce_lr_on_plateau_args)$": _OPTIMISER,
    r"::test_bnb_(optim_\w+|8bit_optimizer_skip_embedding)$": _OPTIMISER,
    r"::test_(get_optimizer_group|no_wd_param_group|get_learning_rates)$": _GROUPS,
    r"::test_auto_batch_size_with_resume_from_checkpoint$": (
        "auto_find_batch_size is refused: a run whose batch size changes cannot be repeated"
    ),
    r"TrainerInterruptedTrainingTest::test_resume_batch_order$": (
        "it asks for optim='sgd', of a model that writes the order of the data into a buffer in its forward"
    ),
    r"JITCheckpointTest::test_integration_with_trainer$": (
        "a SIGTERM ends in a checkpoint without enable_jit_checkpoint, which is said to be ignored"
    ),
    r"::test_evaluate_before_training_with_fsdp2$": "a run has one process, and its evaluation wraps no model",
    r"::test_train_and_predict_loss_parity$": "the loss of a step is the mean of both sides of its direction",
}


@dataclass
class Outcome:
    """What became of the suite.

    Attributes:
        passed: the names of the tests that passed.
        failed: name → the last line of its error.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def explain(self, reasons: dict[str, str]) -> tuple[dict[str, str], list[str]]:
        """Return the failed tests that have a reason, with it, and those that have none."""
        known: dict[str, str] = {}
        for name in self.failed:
            why = next((why for pattern, why in reasons.items() if re.search(pattern, name)), None)
            if why is not None:
                known[name] = why
        return known, [name for name in self.failed if name not in known]

    def limit_to(self, names: list[str]) -> Outcome:
        """Return the outcome of these tests alone; one that did not run has failed."""
        failed = {name: self.failed.get(name, "it did not run") for name in names if name not in self.passed}
        return Outcome([name for name in names if name in self.passed], failed)


class _Collects:
    """A plugin of pytest that notes outcomes, subtests included in their test."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[-1].split("[")[0] if "::" in report.nodeid else report.nodeid
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            errors = [line[2:].strip() for line in text if line.startswith("E ")]
            self.outcome.failed[name] = (errors or text or ["no message"])[0]
        elif report.when == "call" and report.passed and name not in self.outcome.failed:
            self.outcome.passed.append(name)


@contextmanager
def substitute() -> Iterator[None]:
    """Let ``from transformers import Trainer`` give ours, also from the module that defines it."""
    import transformers
    import transformers.trainer

    theirs, ours = transformers.Trainer, make_trainer()
    try:
        for module in (transformers, transformers.trainer):
            module.Trainer = ours  # type: ignore[misc]
        yield
    finally:
        for module in (transformers, transformers.trainer):
            module.Trainer = theirs  # type: ignore[misc]


def make_trainer() -> type:
    """Make a ``ZOTrainer`` that takes ``TrainingArguments``."""
    from transformers import TrainingArguments

    from zowrap.training.trainer import ZOTrainer

    class SuiteTrainer(ZOTrainer):
        def __init__(self, model: Any = None, args: Any = None, *positional: Any, **kwargs: Any) -> None:
            given = TrainingArguments("tmp_trainer") if args is None else args
            super().__init__(model, convert(given), *positional, **kwargs)

    return SuiteTrainer


# What the tests count on, where they set nothing.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5, "lr_scheduler_type": "linear", "eval_strategy": "no", "eval_on_start": False,
    "save_steps": 500, "save_total_limit": 0, "logging_steps": 500, "engine": "eager", "overwrite": True,
}  # fmt: skip


def convert(args: Any) -> Any:
    """Convert ``TrainingArguments`` (or a class derived from it) into a ``ZOConfig`` that sets the same options."""
    from transformers import TrainingArguments

    from zowrap.training.config import ZOConfig

    if isinstance(args, ZOConfig):
        return args
    fresh = TrainingArguments(str(args.output_dir))
    options = {
        each.name: getattr(args, each.name)
        for each in dataclasses.fields(TrainingArguments)
        if each.init and getattr(args, each.name) != getattr(fresh, each.name)
    }
    options.pop("output_dir", None)
    return ZOConfig(str(args.output_dir), **{**DEFAULTS, "report_to": args.report_to, **options})


def find_files(checkout: Path) -> list[Path]:
    """List the files with the Trainer's tests, without those for several processes or machines."""
    folder = checkout / "tests" / "trainer"
    if not folder.is_dir():
        sys.exit(f"{checkout} is no checkout of transformers: there is no tests/trainer in it")
    left_out = re.compile(r"distributed|fsdp|tpu|context_parallel|deepspeed")
    return [file for file in sorted(folder.glob("test_trainer*.py")) if not left_out.search(file.name)]


def run(checkout: Path, ours: bool, *options: str) -> Outcome:
    """Run the suite of a checkout in this process, and return what became of it.

    Args:
        checkout: of transformers.
        ours: with ``ZOTrainer`` in the Trainer's place.
        options: of pytest.
    """
    plugin = _Collects()
    files = find_files(checkout)
    os.chdir(checkout)
    with substitute() if ours else contextlib.nullcontext():
        common = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={checkout}"]
        pytest.main([*common, *options, *map(str, files)], plugins=[plugin])
    return plugin.outcome


def run_apart(checkout: Path, ours: bool, *options: str) -> Outcome:
    """Run the suite in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcome.json"
        which = ["--ours"] if ours else ["--theirs"]
        command = [
            sys.executable,
            __file__,  # by its path: the checkout has a package named tests as well
            str(checkout),
            *which,
            "--outcome",
            str(file),
            *options,
        ]
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        subprocess.run(command, env=environment, stdout=sys.stderr)
        return Outcome(**json.loads(file.read_text())) if file.is_file() else Outcome()


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkout of transformers")
    parser.add_argument("--list", action="store_true", help="print each failed test with its reason")
    parser.add_argument("--ours", action="store_const", const=True, dest="ours", help=argparse.SUPPRESS)
    parser.add_argument("--theirs", action="store_const", const=False, dest="ours", help=argparse.SUPPRESS)
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    chosen, options = parser.parse_known_args()  # the others are pytest's
    checkout = chosen.path.absolute()
    if chosen.outcome is not None:
        chosen.outcome.write_text(json.dumps(dataclasses.asdict(run(checkout, chosen.ours, *options))))
        return 0
    find_files(checkout)
    can_pass = run_apart(checkout, False, *options).passed
    outcome = run_apart(checkout, True, *options).limit_to(can_pass)
    known, unknown = outcome.explain(REASONS)
    for name, why in known.items() if chosen.list else ():
        print(f"rightly fails  {name}: {why}")
    for name in unknown:
        print(f"FAILED         {name}: {outcome.failed[name]}")
    print(
        f"{len(outcome.passed)} of the {len(can_pass)} tests that the Trainer passes here pass, {len(known)} rightly "
        f"fail, {len(unknown)} fail without a reason"
    )
    return 1 if unknown or not can_pass else 0


if __name__ == "__main__":
    sys.exit(main())
