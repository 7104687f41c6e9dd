"""Train the victim of the black-box attack, a small convolutional network on scikit-learn's 8×8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.rules import Scalars

CLASSES, PIXELS = 10, 64
DISTORTION = 0.1  # weight of ‖δ‖² relative to the margin


class Victim(nn.Module):
    """Two convolutions and a linear layer; images float32 ``[rows, 64]`` in [0, 1] → logits ``[rows, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels (1437), test images and labels (360), in a fixed random order.

    Raises:
        ZOError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ZOError("E5 needs scikit-learn: pip install 'zowrap[benchmarks]'") from None
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def train(images: Tensor, labels: Tensor, epochs: int) -> Victim:
    """Train a victim by backpropagation (Adam, η 3e-3, batches of 64), without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        victim = Victim()
        optimizer = torch.optim.Adam(victim.parameters(), lr=3e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(victim(images[rows]), labels[rows]).backward()
                optimizer.step()
    return victim.eval().requires_grad_(False)


def targets(victim: Victim, images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images that the victim gets right, as many of each class as possible, and another class for each.

    Returns:
        float32 ``[count, 64]`` and int64 ``[count]``.
    """
    right = victim(images).argmax(-1) == labels
    chosen = []
    for i in range(count):
        of_class = (right & (labels == i % CLASSES)).nonzero().flatten()
        chosen.append(int(of_class[i // CLASSES]))
    rows = torch.tensor(chosen)
    shift = 1 + torch.arange(count) * 7 % (CLASSES - 1)
    return images[rows], (labels[rows] + shift) % CLASSES


def attacked(delta: Tensor, image: Tensor) -> Tensor:
    """The image with the perturbation, kept in the range of pixels."""
    return (image + delta).clamp(0, 1)


def attack(victim: Victim, delta: Tensor, data: Scalars) -> Tensor:
    """The margin by which the target's logit is below the highest other one, plus ``DISTORTION`` · ‖δ‖². 0-d.

    ``delta`` ``[64]``; ``data`` holds ``image`` ``[64]`` and ``target`` (0-d int64).
    """
    logits = victim(attacked(delta.float(), data["image"]).unsqueeze(0))[0]
    target = torch.arange(CLASSES) == data["target"]
    others = torch.where(target, -torch.inf, logits).max()
    wanted = torch.where(target, logits, 0.0).sum()
    return (others - wanted).double() + DISTORTION * (delta.double() ** 2).sum()
