"""Compare zowrap on the demo's task with logistic regression on frozen embeddings and with backpropagation.

    python -m benchmarks.demo            # measures all and writes benchmarks/results/demo.json
    python -m benchmarks.demo zowrap     # measures only this one and keeps the others
    python -m benchmarks.demo --table    # prints the README's table from that file

All three see the same 400 training and 80 held-out rows of examples/support_messages, and are scored once on its 240
test messages. Each run is a separate process: its seconds include imports and compiling, and its peak memory is the
system's count. zowrap's settings are the demo's own. The others' are chosen on the held-out rows: logistic regression
uses the best C of ``CS``; backpropagation (AdamW on the demo's loss, 20 · cosine with the label names, moving all
weights of the layers) uses the best rate of ``RATES``, found with seed 0, and in each run the best epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples import demo
from zowrap.numerics.intervals import wilson_interval

RESULTS = Path(__file__).parent / "results" / "demo.json"
SEEDS = (0, 1, 2)
CS = (0.1, 1.0, 10.0, 100.0)
RATES = (3e-5, 1e-4)
EPOCHS, BATCH = 4, 32
SCALE = 20.0  # of the cosine, as in zowrap.tasks.forms
METHODS = {
    "zowrap": "zowrap, forward passes alone (`make demo`)",
    "logistic": "logistic regression on the frozen embeddings",
    "backprop": "backpropagation (AdamW, all layers)",
}


class Encoder:
    """The demo's encoder, loaded with plain transformers, and the rows as (texts, label numbers)."""

    def __init__(self, folder: Path) -> None:
        demo.quiet_transformers()
        from transformers import AutoModel, AutoTokenizer

        paths = {"train": folder / "train.jsonl", "dev": folder / "dev.jsonl", "test": demo.DATA / "test.jsonl"}
        rows = {name: demo.read_jsonl(path) for name, path in paths.items()}
        self.labels = sorted({row["label"] for row in rows["train"]})
        self.rows = {
            name: ([row["text"] for row in each], [self.labels.index(row["label"]) for row in each])
            for name, each in rows.items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(demo.minilm())
        self.model = AutoModel.from_pretrained(demo.minilm()).eval()

    def embed(self, texts: list[str]) -> Any:
        """Unit vectors, float32 ``[rows, width]``."""
        return demo.embed(self.model, self.tokenizer, texts)

    def frozen(self, name: str) -> Any:
        """Embed a part of the data in batches, without gradients."""
        import torch

        texts, _ = self.rows[name]
        with torch.no_grad():
            return torch.cat([self.embed(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])

    def accuracy(self, name: str) -> float:
        """The accuracy on a part of the data, by the cosine with the label names."""
        import torch

        with torch.no_grad():
            found = (self.frozen(name) @ self.embed(self.labels).T).argmax(-1)
        return float((found == torch.tensor(self.rows[name][1])).float().mean())


def logistic(folder: Path, seed: int, rate: float | None) -> dict[str, Any]:
    """Fit a logistic regression on frozen embeddings; the problem is convex, so the seed has no effect."""
    from sklearn.linear_model import LogisticRegression

    encoder = Encoder(folder)
    inputs = {name: encoder.frozen(name).numpy() for name in encoder.rows}
    targets = {name: labels for name, (_, labels) in encoder.rows.items()}
    found = []
    for c in CS:
        fitted = LogisticRegression(C=c, max_iter=1000).fit(inputs["train"], targets["train"])
        found.append((fitted.score(inputs["dev"], targets["dev"]), -c, fitted))
    dev, c, fitted = max(found, key=lambda each: each[:2])
    return {"C": -c, "dev": float(dev), "test": float(fitted.score(inputs["test"], targets["test"]))}


def backprop(folder: Path, seed: int, rate: float | None) -> dict[str, Any]:
    """Train with AdamW on the demo's loss, and return the epoch that is best on the held-out rows."""
    import torch
    from torch.nn import functional as F

    encoder = Encoder(folder)
    torch.manual_seed(seed)
    texts, labels = encoder.rows["train"]
    weights = list(encoder.model.encoder.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate or RATES[0], weight_decay=0.0)
    best = {"dev": encoder.accuracy("dev"), "epoch": 0, "test": encoder.accuracy("test")}
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(texts)).split(BATCH):
            chosen = batch.tolist()
            logits = SCALE * encoder.embed([texts[i] for i in chosen]) @ encoder.embed(encoder.labels).T
            loss = F.cross_entropy(logits, torch.tensor([labels[i] for i in chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dev = encoder.accuracy("dev")
        if dev > best["dev"]:
            best = {"dev": dev, "epoch": epoch, "test": encoder.accuracy("test")}
    return {"lr": rate, **best}


def zowrap(folder: Path, seed: int) -> dict[str, Any]:
    """Run the demo's own commands; seconds and peak memory are those of ``zowrap tune``."""
    train, dev = demo.split_training_file(folder)
    run = folder / f"run{seed}"
    tuned = demo.tune(train, dev, run, seed)
    after = demo.zowrap("eval", run, "--data", demo.DATA / "test.jsonl")
    facts = {"dev": tuned["accuracy"], "dev_before": tuned["accuracy_before"], "best_step": tuned["best_step"]}
    return {"seed": seed, **facts, "test": after["accuracy"], "seconds": tuned["wall"], "peak_mb": tuned["peak"]}


ALONE: dict[str, Callable[[Path, int, float | None], dict[str, Any]]] = {"logistic": logistic, "backprop": backprop}


def run_in_process(way: str, folder: Path, seed: int, rate: float | None = None) -> dict[str, Any]:
    """Run one method in its own process, and add its seconds and peak memory."""
    command = [sys.executable, "-m", "benchmarks.demo", "--way", way, "--folder", str(folder), "--seed", str(seed)]
    record, seconds, peak = demo.measured([*command, *(["--rate", str(rate)] if rate else [])])
    return {"seed": seed, **record, "seconds": seconds, "peak_mb": peak}


def measure(ways: list[str], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Run the given methods, and take the runs of the others from ``runs``, in the order of :data:`METHODS`."""
    with tempfile.TemporaryDirectory(prefix="zowrap-demo-") as name:
        folder = Path(name)
        demo.split_training_file(folder)
        before = demo.zowrap("eval", demo.minilm(), "--task", "classification", "--data", demo.DATA / "test.jsonl")
        if "zowrap" in ways:
            runs["zowrap"] = [zowrap(folder, seed) for seed in SEEDS]
        if "logistic" in ways:
            runs["logistic"] = [run_in_process("logistic", folder, 0)]
        if "backprop" in ways:
            tried = [run_in_process("backprop", folder, 0, rate) for rate in RATES]
            best = max(tried, key=lambda each: each["dev"])
            runs["backprop"] = [best, *(run_in_process("backprop", folder, seed, best["lr"]) for seed in SEEDS[1:])]
    ordered = {way: runs[way] for way in METHODS if way in runs}
    return {"rows": before["examples"], "before": before["accuracy"], "cores": os.cpu_count(), "runs": ordered}


def table(record: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        f"| {record['rows']} test messages | accuracy (seeds {', '.join(map(str, SEEDS))}) | 95 % interval of the mean "
        "| seconds | peak memory |",
        "|---|---|---|---|---|",
        f"| before | {record['before']:.3f} | {_interval(record['before'], record)} | | |",
    ]
    for way, runs in record["runs"].items():
        found = [run["test"] for run in runs]
        figures = ", ".join(f"{each:.3f}" for each in found)
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        peak = max(run["peak_mb"] for run in runs)
        mean = _interval(sum(found) / len(found), record)
        lines.append(f"| {METHODS[way]} | {figures} | {mean} | {seconds:.0f} | {peak / 1000:.1f} GB |")
    return "\n".join(lines)


def _interval(accuracy: float, record: dict[str, Any]) -> str:
    low, high = wilson_interval(accuracy * record["rows"], record["rows"])
    return f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("ways", nargs="*", choices=[[], *METHODS], help="what to measure; by default all")
    parser.add_argument("--table", action="store_true", help="print the table of the last measurement")
    parser.add_argument("--way", choices=list(ALONE), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(ALONE[options.way](options.folder, options.seed, options.rate)))
        return
    if not options.table:
        began = time.time()
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"] if options.ways else {}
        record = measure(options.ways or list(METHODS), kept)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{time.time() - began:.0f} s")
    print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
