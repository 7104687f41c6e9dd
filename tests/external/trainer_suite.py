"""Run the tests that transformers has for its ``Trainer``, with ``ZOTrainer`` in its place.

    python -m tests.external.trainer_suite PATH [--list] [--table] [OPTIONS OF PYTEST]

PATH is a checkout of transformers, near the installed version; the installed package is what runs, and the checkout
gives the tests. They run twice, each time in a process of its own: with the Trainer itself, which tells what can pass
on this machine at all (without a GPU, the hub, or a package), and with ``ZOTrainer`` wherever ``Trainer`` is imported.
``TrainingArguments`` are then a ``ZOConfig`` with the Trainer's defaults for the learning rate and for what is due
when, since the tests count on these; a folder may be trained into again.

The exit status is 0 if every test that the Trainer passes and ours does not has its line in :data:`REASONS`, and no
line is left over.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_PICKLES = "it looks for files that are pickles (`optimizer.pt`, `training_args.bin` …): ours are safetensors and JSON"
_OPTIMISER = "it brings an optimiser of its own, which is refused: the update is the rule's"
# A pattern for names of tests (``Class::test``, without parameters) → why such a test rightly fails.
REASONS: dict[str, str] = {
    r"TrainerCheckpointSaveTest::test_save_checkpoints$": _PICKLES,
    r"TrainerBestModelTest::test_load_best_model_from_safetensors$": _PICKLES,
    r"TrainerBestModelTest::test_load_best_model_at_end$": (
        f"{_PICKLES}; and it expects the first of several models of equal accuracy: ours is the one of the lowest loss"
    ),
    r"TrainerBestModelTest::test_save_best_checkpoint$": (
        f"{_PICKLES}; and it counts the entries of the folder, which holds the run's journal and the best model as well"
    ),
    r"TrainerBestModelTest::test_best_model_checkpoint_behavior$": (
        "it counts the entries of the folder, which holds the run's journal as well; and it expects the best model in "
        "a checkpoint: ours lies in the folder itself"
    ),
    r"::test_(adafactor_lr_none|custom_optimizer|reduce_lr_on_plateau_args|greedy_lr_args)$": _OPTIMISER,
    r"::test_bnb_(optim_\w+|8bit_optimizer_skip_embedding)$": (
        "it chooses an optimiser of bitsandbytes by `optim=`, which is refused: the update is the rule's"
    ),
    r"TrainerInterruptedTrainingTest::test_resume_batch_order$": (
        'it asks for `optim="sgd"`, which is refused; and its model counts forwards, of which a step has two and a '
        "resumed run none for the steps it replays"
    ),
    r"TrainerAutoBatchSizeTest::test_auto_batch_size_with_resume_from_checkpoint$": (
        "`auto_find_batch_size` is refused: a run whose batch size changes cannot be repeated"
    ),
    r"TrainerNEFTuneTest::test_neftune$": (
        "`neftune_noise_alpha` is refused: its noise would differ between the two sides of a step"
    ),
    r"TrainerLoggingTest::test_logging_inf_nan_filter$": (
        "it trains on without a finite loss (`learning_rate=1e9`): ours ends as failed after 20 such steps in a row"
    ),
    r"TestTrainingArguments::test_torch_compile_auto_enable$": (
        "it asks whether `torch_compile` is set, which is ignored with a warning: the engine compiles the step itself"
    ),
}


@dataclass
class Outcome:
    """What became of the suite.

    Attributes:
        passed: the names of the tests that passed.
        failed: name → the last line of its error.
        skipped: the names of those that need what this machine does not have.
        made_ours: the names of those that made a ``ZOTrainer`` or a ``ZOConfig``; the others cannot tell the two apart.
    """

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    made_ours: list[str] = field(default_factory=list)

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
        made_ours = [name for name in names if name in self.made_ours]
        return Outcome([name for name in names if name in self.passed], failed, made_ours=made_ours)


class _Collects:
    """A plugin of pytest that notes outcomes, subtests included in their test."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self._running: str | None = None

    def note_ours(self) -> None:
        """Note that the running test made something of ours."""
        if self._running is not None and self._running not in self.outcome.made_ours:
            self.outcome.made_ours.append(self._running)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running = _name(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self._running = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = _name(report.nodeid)
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            errors = [line[2:].strip() for line in text if line.startswith("E ")]
            self.outcome.failed[name] = (errors or text or ["no message"])[0]
        elif report.skipped:
            self.outcome.skipped.append(name)
        elif report.when == "call" and name not in self.outcome.failed:
            self.outcome.passed.append(name)


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[-1].split("[")[0]


@contextmanager
def substitute(note: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let ``from transformers import Trainer, TrainingArguments`` give ours, the first also from its own module.

    Args:
        note: called for each of them that is made.
    """
    import transformers
    import transformers.trainer

    trainer, arguments = transformers.Trainer, transformers.TrainingArguments
    ours = make_trainer(note)
    try:
        for module in (transformers, transformers.trainer):
            module.Trainer = ours  # type: ignore[misc]
        transformers.TrainingArguments = make_arguments(note)  # type: ignore[misc]
        yield
    finally:
        for module in (transformers, transformers.trainer):
            module.Trainer = trainer  # type: ignore[misc]
        transformers.TrainingArguments = arguments  # type: ignore[misc]


def make_trainer(note: Callable[[], None] = lambda: None) -> type:
    """Make a ``ZOTrainer`` with the suite's arguments where it is given none."""
    from zowrap.training.trainer import ZOTrainer

    class SuiteTrainer(ZOTrainer):
        def __init__(self, model: Any = None, args: Any = None, *positional: Any, **kwargs: Any) -> None:
            note()
            given = make_arguments(note)("tmp_trainer") if args is None else args
            super().__init__(model, given, *positional, **kwargs)

    return SuiteTrainer


def make_arguments(note: Callable[[], None] = lambda: None) -> type:
    """Make a ``ZOConfig`` with the defaults of the Trainer that its tests count on."""
    from zowrap.training.config import ZOConfig

    @dataclass
    class SuiteArguments(ZOConfig):
        learning_rate: float = 5e-5  # type: ignore[assignment]
        lr_scheduler_type: str = "linear"  # type: ignore[assignment]
        eval_strategy: str = "no"  # type: ignore[assignment]
        eval_on_start: bool = False  # type: ignore[assignment]
        save_steps: float = 500  # type: ignore[assignment]
        save_total_limit: int = 0  # type: ignore[assignment]
        logging_steps: float = 500  # type: ignore[assignment]
        engine: str = "eager"  # type: ignore[assignment]
        overwrite: bool = True

        def __post_init__(self) -> None:
            note()
            if self.eval_steps is None and self.eval_strategy == "steps":
                self.eval_steps = self.logging_steps
            super().__post_init__()

    return SuiteArguments


def find_files(checkout: Path) -> list[Path]:
    """List the files with the Trainer's tests, without those for several processes or machines."""
    folder = checkout / "tests" / "trainer"
    if not folder.is_dir():
        sys.exit(f"{checkout} is no checkout of transformers: there is no tests/trainer in it")
    left_out = re.compile(r"distributed|fsdp|tpu|context_parallel|deepspeed")
    found = [*sorted(folder.glob("test_trainer*.py")), *folder.glob("test_training_args.py")]
    return [file for file in found if not left_out.search(file.name)]


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
    with substitute(plugin.note_ours) if ours else contextlib.nullcontext():
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


def find_unused(names: list[str]) -> list[str]:
    """Return the patterns of :data:`REASONS` that explain none of these failed tests."""
    return [pattern for pattern in REASONS if not any(re.search(pattern, name) for name in names)]


def print_table(theirs: Outcome, ours: Outcome, known: dict[str, str], unknown: list[str]) -> None:
    """Print the outcome as Markdown, as docs/trainer.md has it."""
    import transformers

    apart = len([name for name in ours.passed if name not in ours.made_ours])
    print(f"| tests of the Trainer, transformers {transformers.__version__} | |\n|---|---|")
    print(f"| pass with the Trainer on this machine | {len(theirs.passed)} |")
    print(f"| of these pass with `ZOTrainer` and `ZOConfig` as they stand | {len(ours.passed)} |")
    print(f"| … of which make neither (they test callbacks, samplers and the like) | {apart} |")
    print(f"| fail, for a reason given below | {len(known)} |")
    print(f"| fail without a reason | {len(unknown)} |")
    print(f"| do not run on this machine, or fail with the Trainer too | {len(theirs.skipped) + len(theirs.failed)} |")
    print("\n| test | why it fails |\n|---|---|")
    tests: dict[str, list[str]] = {}
    for name, why in known.items():
        tests.setdefault(why, []).append(f"`{name.split('::')[-1]}`")
    for why, names in tests.items():
        print(f"| {', '.join(dict.fromkeys(names))} | {why} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkout of transformers")
    parser.add_argument("--list", action="store_true", help="print each failed test with its reason")
    parser.add_argument("--table", action="store_true", help="print the table of docs/trainer.md")
    parser.add_argument("--ours", action="store_const", const=True, dest="ours", help=argparse.SUPPRESS)
    parser.add_argument("--theirs", action="store_const", const=False, dest="ours", help=argparse.SUPPRESS)
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    chosen, options = parser.parse_known_args()  # the others are pytest's
    checkout = chosen.path.absolute()
    if chosen.outcome is not None:
        chosen.outcome.write_text(json.dumps(dataclasses.asdict(run(checkout, chosen.ours, *options))))
        return 0
    find_files(checkout)
    theirs = run_apart(checkout, False, *options)
    can_pass = theirs.passed
    outcome = run_apart(checkout, True, *options).limit_to(can_pass)
    known, unknown = outcome.explain(REASONS)
    if chosen.table:
        print_table(theirs, outcome, known, unknown)
    for name, why in known.items() if chosen.list else ():
        print(f"rightly fails  {name}: {why}")
    for name in unknown:
        print(f"FAILED         {name}: {outcome.failed[name]}")
    unused = [] if options else find_unused(list(known))
    for pattern in unused:
        print(f"UNUSED REASON  {pattern}")
    print(
        f"{len(outcome.passed)} of the {len(can_pass)} tests that the Trainer passes here pass, {len(known)} rightly "
        f"fail, {len(unknown)} fail without a reason"
    )
    return 1 if unknown or unused or not can_pass else 0


if __name__ == "__main__":
    sys.exit(main())
