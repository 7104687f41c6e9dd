"""The demo's settings, chosen without its test file: learning rates and sizes compared on held-out situations.

    python -m benchmarks.demo_settings    # half an hour; prints a table

The test file of examples/support_messages holds situations that training does not. To choose for such a file, the
training messages of each label are clustered by their embeddings into ten groups, which stand for its ten situations.
In each of sixteen splits three groups of every label are held out, and 60 other messages choose the best of four
evaluations, as in the demo. The encoder stays as it is in the demo, so its embeddings are computed once here, and the
label vectors are tuned on them by ``zo_wrap``, directions and rule as in the demo.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

import zowrap
from benchmarks.demo import SCALE, Encoder
from examples import demo

SPLITS, GROUPS, HELD_OUT, DEV = 16, 10, 3, 60
CANDIDATES: list[dict[str, Any]] = [
    {"steps": steps, "queries": queries, "batch_size": batch_size, "lr": lr}
    for steps, queries, batch_size, lr in (
        (400, 128, 32, 2e-2),
        (400, 128, 32, 5e-3),
        (400, 128, 32, 2e-3),
        (400, 128, 48, 3e-3),
        (400, 128, 48, 2e-3),
        (400, 128, 48, 1.5e-3),
        (400, 192, 32, 2e-3),
        (500, 128, 32, 1.5e-3),
        (300, 64, 32, 2e-3),
    )
]


class Split(NamedTuple):
    """Row numbers, int64: to train on, to choose the best evaluation by, and of situations that neither has."""

    train: Tensor
    dev: Tensor
    held_out: Tensor


class LabelVectors(nn.Module):
    """Scores of embeddings ``[rows, width]``: 20 · cosine with a vector for each label."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors.clone())

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * x @ F.normalize(self.weight, dim=-1).T


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def group_by_situation(x: Tensor, y: Tensor) -> list[int]:
    """A group for each row: clusters of the embeddings of each label."""
    groups = np.zeros(len(y), dtype=int)
    for label in range(int(y.max()) + 1):
        rows = torch.where(y == label)[0].numpy()
        groups[rows] = label * GROUPS + KMeans(GROUPS, n_init=5, random_state=0).fit_predict(x[rows].numpy())
    return groups.tolist()


def split(groups: list[int], seed: int) -> Split:
    """Hold out :data:`HELD_OUT` groups of every label."""
    draw = random.Random(seed)
    labels = range(max(groups) // GROUPS + 1)
    chosen = {label * GROUPS + group for label in labels for group in draw.sample(range(GROUPS), HELD_OUT)}
    rest = [row for row, group in enumerate(groups) if group not in chosen]
    draw.shuffle(rest)
    held_out = [row for row, group in enumerate(groups) if group in chosen]
    return Split(torch.tensor(rest[DEV:]), torch.tensor(rest[:DEV]), torch.tensor(held_out))


def tune(x: Tensor, y: Tensor, names: Tensor, parts: Split, seed: int, candidate: dict[str, Any]) -> float:
    """Accuracy on the held-out situations at the evaluation that is best on the dev rows."""
    steps, batch_size, lr = candidate["steps"], candidate["batch_size"], candidate["lr"]
    model, found = LabelVectors(names), []
    zm = zowrap.zo_wrap(model, lr=lr, queries=candidate["queries"], seed=seed, loss_fn=loss_fn, engine="eager")
    shuffle, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.cat((order, parts.train[torch.randperm(len(parts.train), generator=shuffle)]))
        batch, order = order[:batch_size], order[batch_size:]
        zm.lr = lr * (1 + np.cos(np.pi * (step - 1) / steps)) / 2
        zm.step(x=x[batch], y=y[batch])
        if step % (steps // 4) == 0:
            found.append((_accuracy(model, x, y, parts.dev), step, _accuracy(model, x, y, parts.held_out)))
    return max(found, key=lambda each: each[0])[2]


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> float:
    return float((model(x[rows]).argmax(-1) == y[rows]).float().mean())


def embed_training_file() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``[480, width]`` and labels ``[480]`` of the training file, and embeddings of the label names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo.split_training_file(folder)
        encoder = Encoder(folder)
    x = torch.cat((encoder.frozen("train"), encoder.frozen("dev")))
    y = torch.tensor(encoder.rows["train"][1] + encoder.rows["dev"][1])
    with torch.no_grad():
        return x, y, encoder.embed(encoder.labels)


def main() -> None:
    x, y, names = embed_training_file()
    splits = [split(group_by_situation(x, y), seed) for seed in range(SPLITS)]
    before = [_accuracy(LabelVectors(names), x, y, parts.held_out) for parts in splits]
    print(f"untuned {np.mean(before):.3f}")
    for c in (1.0, 10.0, 100.0):
        fitted = [
            LogisticRegression(C=c, max_iter=1000).fit(x[p.train], y[p.train]).score(x[p.held_out], y[p.held_out])
            for p in splits
        ]
        print(f"logistic regression, C {c:g}: {np.mean(fitted):.3f}")
    for candidate in CANDIDATES:
        found = [tune(x, y, names, parts, seed, candidate) for seed, parts in enumerate(splits)]
        print(f"{candidate}: {np.mean(found):.3f}", flush=True)


if __name__ == "__main__":
    main()
