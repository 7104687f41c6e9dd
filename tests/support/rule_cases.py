"""Every rule written again in NumPy, and the means to feed the library and the reference the same losses.

The references share nothing with the library but the raw noise u: projected gradients, directions, state and update are
formed here, in float64, over one flat vector of all (active) parameters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from zowrap import rules
from zowrap.numerics import noise
from zowrap.step import blocks
from zowrap.testing import EPS, LR, draw_losses, wrap

__all__ = ["CASES", "EPS", "KINDS", "LR", "draw_losses", "feed", "flat", "name_of", "noise_of", "wrap"]


class Seen(NamedTuple):
    """One step as a reference sees it: its number from 1, projected gradients, raw directions, losses.

    ``factors`` holds, for each parameter, U ``[queries, rows, rank]`` and V ``[queries, columns, rank]`` (None for a
    vector) where directions are low-rank.
    """

    t: int
    g: np.ndarray
    u: np.ndarray
    losses: np.ndarray
    factors: list[tuple[np.ndarray, np.ndarray | None]] | None = None


def slopes(estimator: str, losses: np.ndarray) -> np.ndarray:
    if estimator == "forward":
        return (losses[1:] - losses[0]) / EPS
    losses = losses[len(losses) % 2 :]  # HiZOO looks at θ first
    return (losses[0::2] - losses[1::2]) / (2 * EPS)


def flat(zm: Any, block: int = 0) -> np.ndarray:
    return np.concatenate(
        [zm.parameters[i].tensor.detach().double().numpy().ravel() for i in zm.job.blocks[block].indices]
    )


def noise_of(zm: Any, step: int, block: int = 0) -> np.ndarray:
    """Raw directions ``[queries, elements]`` of the block's parameters."""
    law, out = zm.job.direction.law, []
    ids = torch.tensor([p.id for p in zm.parameters])
    for query in range(zm.job.queries):
        keys = noise.derive_keys(zm.seed, step, query, ids, noise.TAG_DIRECTION)
        parts = [
            noise.draw(law, keys[i], zm.parameters[i].tensor.shape).double().numpy().ravel()
            for i in zm.job.blocks[block].indices
        ]
        out.append(np.concatenate(parts))
    return np.stack(out)


def factors_of(zm: Any, step: int, block: int = 0) -> list[tuple[np.ndarray, np.ndarray | None]] | None:
    """Raw factors of the block's parameters, drawn here from their keys."""
    law = zm.job.direction.lowrank
    if law is None:
        return None
    ids, out = torch.tensor([p.id for p in zm.parameters]), []
    for i in zm.job.blocks[block].indices:
        shape, left, right = zm.parameters[i].tensor.shape, [], []
        for query in range(zm.job.queries):
            keys = noise.derive_keys(zm.seed, step, query, ids, noise.TAG_DIRECTION)[i]
            when = (step, query) if law.nu is None else (step // law.nu, 0)
            other = noise.derive_keys(zm.seed, *when, ids, noise.TAG_RIGHT)[i]
            rank = 1 if len(shape) == 1 else law.rank
            left.append(noise.draw("gaussian", keys, (shape[0], rank)).double().numpy())
            if len(shape) > 1:
                right.append(noise.draw("gaussian", other, (shape[1:].numel(), rank)).double().numpy())
        out.append((np.stack(left), np.stack(right) if right else None))
    return out


def feed(zm: Any, losses: list[torch.Tensor]) -> list[list[Seen]]:
    """Update with these losses; what each block saw, in order."""
    seen: list[list[Seen]] = [[] for _ in zm.job.blocks]
    for given in losses:
        step = zm.step_count
        block = blocks.active(step, len(zm.job.blocks), zm.options.block_order, zm.seed)
        zm.discard()
        values = given.double().numpy()
        g = slopes(zm.options.estimator, values[: len(zm.points)])
        seen[block].append(Seen(step + 1, g, noise_of(zm, step, block), values, factors_of(zm, step, block)))
        assert not zm.update(losses=given).skipped
    return seen


# --- the references -----------------------------------------------------------------------------------------------


def np_zo_sgd(w, history, momentum=0.0, sign=None, conservative=False):
    b = np.zeros_like(w)
    if conservative:
        for _, g, z, losses, _ in history:
            w = w - LR * (0.0, 1.0, -1.0)[int(np.argmin(losses[-3:]))] * g @ z
        return w
    for _, g, z, *_ in history:
        ghat = (np.sign(g) if sign == "scalar" else g) @ z / len(g)
        b = momentum * b + (np.sign(ghat) if sign == "elementwise" else ghat)
        w = w - LR * b
    return w


def np_meazo(w, history, beta=0.99, zeta=1e-8, moment="mean", literal=False):
    v = 0.0
    for n, (_, g, z, *_) in enumerate(history, start=1):
        v = beta * v + (1 - beta) * (np.mean(g) ** 2 if moment == "printed" else np.mean(g**2) / len(g))
        vhat = v / (1 - beta ** (max(n - 1, 1) if literal else n))
        w = w - LR / (np.sqrt(vhat) + zeta) * (g @ z) / len(g)
    return w


def np_zo_adam(w, history, beta1=0.9, beta2=0.999, zeta=1e-8):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for n, (_, g, z, *_) in enumerate(history, start=1):
        ghat = g @ z / len(g)
        m, v = beta1 * m + (1 - beta1) * ghat, beta2 * v + (1 - beta2) * ghat**2
        w = w - LR * (m / (1 - beta1**n)) / (np.sqrt(v / (1 - beta2**n)) + zeta)
    return w


def np_zo_rmsprop(w, history, beta2=0.99, zeta=1e-8):
    v = np.zeros_like(w)
    for n, (_, g, z, *_) in enumerate(history, start=1):
        ghat = g @ z / len(g)
        v = beta2 * v + (1 - beta2) * ghat**2
        w = w - LR * ghat / (np.sqrt(v / (1 - beta2**n)) + zeta)
    return w


def np_zo_adamm(w, history, beta1=0.9, beta2=0.99, zeta=1e-8, amsgrad=True):
    m, v, top = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for _, g, z, *_ in history:
        ghat = g @ z / len(g)
        m, v = beta1 * m + (1 - beta1) * ghat, beta2 * v + (1 - beta2) * ghat**2
        top = np.maximum(top, v) if amsgrad else v
        w = w - LR * m / (np.sqrt(top) + zeta)
    return w


def np_radazo(w, history, beta1=0.9, beta2=0.99, zeta=1e-8, bias_correction=False):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for n, (_, g, z, *_) in enumerate(history, start=1):
        m = beta1 * m + (1 - beta1) * (g @ z) / len(g)
        v = beta2 * v + (1 - beta2) * m**2
        a, b = (1 - beta1**n, 1 - beta2**n) if bias_correction else (1, 1)
        w = w - LR * (m / a) / np.sqrt(v / b + zeta)
    return w


def np_conmezo(w, history, theta=1.35, beta=0.99, warmup=False):
    m = np.zeros_like(w)
    for t, g, u, *_ in history:
        norm = np.linalg.norm(m)
        z = u if norm < 1e-8 else np.sqrt(len(w)) * math.cos(theta) * m / norm + math.sin(theta) * u
        b = beta
        if warmup and t <= warmup / 100:
            b = 0.1
        elif warmup and t <= warmup / 10:
            p = ((t - warmup / 100) / (0.09 * warmup)) ** 1.8
            b = beta - (beta - 0.1) / (1 + 8 * p) ** 3
        ghat = g @ z / len(g)
        w, m = w - LR * ghat, b * m + (1 - b) * ghat
    return w


def np_fzoo(w, history):
    for _, _, u, losses, _ in history:
        base, sides = losses[0], losses[1:]
        sigma = np.std(sides, ddof=1)
        w = w - LR * sum((l_i - base) * u_i for l_i, u_i in zip(sides, u, strict=True)) / (EPS * len(sides) * sigma)
    return w


def np_hizoo(w, history, a=1e-8):
    h = np.ones_like(w)
    for _, g, u, losses, _ in history:
        z = u / np.sqrt(h)
        w = w - LR * g @ z / len(g)
        curvature = np.abs(losses[1::2] + losses[2::2] - 2 * losses[0]) / (2 * EPS**2)
        h = (1 - a) * h + a * h * (curvature @ u**2) / len(g)
    return w


def np_sparse_mezo(w, history, sparsity=0.75, refresh=1):
    sizes = [15, 5, 10, 2] if len(w) == 32 else [15, 5] if len(w) == 20 else [10, 2]

    def thresholds(w):
        parts = [np.abs(p) for p in np.split(w, np.cumsum(sizes)[:-1])]
        return np.concatenate(
            [np.full(len(p), np.sort(p)[max(1, math.ceil((1 - sparsity) * len(p))) - 1]) for p in parts]
        )

    limit = thresholds(w)
    for t, g, u, *_ in history:
        if refresh and t > 1 and (t - 1) % refresh == 0:
            limit = thresholds(w)
        w = w - LR * (g @ u) / len(g) * (np.abs(w) <= limit)
    return w


def np_lozo(w, history, rank=2, nu=50, scale="paper"):
    for _, g, _, _, factors in history:
        change = []
        for left, right in factors:
            z = left[..., 0] if right is None else np.einsum("qir,qjr->qij", left, right)
            change.append(np.tensordot(g, z, 1).ravel() / (1 if scale == "code" else rank))
        w = w - LR * np.concatenate(change) / len(g)
    return w


def np_lozo_m(w, history, rank=2, nu=50, scale="paper", beta1=0.9):
    kept: list[tuple] = [(0.0, None)] * len(history[0].factors)
    for _, g, _, _, factors in history:
        change, new = [], []
        for (n, old), (left, right) in zip(kept, factors, strict=True):
            if old is not None and not np.array_equal(old, right[0]):
                n = n @ (old.T @ right[0]) / len(old)
            n = beta1 * n + (1 - beta1) * np.tensordot(g, left, 1) / len(g)
            step = n[:, 0] if right is None else n @ right[0].T
            change.append(step.ravel() / (1 if scale == "code" else rank))
            new.append((n, None if right is None else right[0]))
        w, kept = w - LR * np.concatenate(change), new
    return w


CASES = [
    ("zo_sgd", {}, np_zo_sgd),
    ("zo_sgd", {"momentum": 0.9}, np_zo_sgd),
    ("zo_sgd", {"sign": "scalar"}, np_zo_sgd),
    ("zo_sgd", {"sign": "elementwise"}, np_zo_sgd),
    ("zo_sgd", {"conservative": True}, np_zo_sgd),
    ("lozo", {}, np_lozo),
    ("lozo", {"rank": 3, "nu": 4, "scale": "code"}, np_lozo),
    ("lozo_m", {}, np_lozo_m),
    ("lozo_m", {"nu": 3, "beta1": 0.5}, np_lozo_m),
    ("sparse_mezo", {}, np_sparse_mezo),
    ("sparse_mezo", {"sparsity": 0.3, "refresh": 4}, np_sparse_mezo),
    ("zo_rmsprop", {}, np_zo_rmsprop),
    ("zo_adam", {}, np_zo_adam),
    ("zo_adam", {"beta1": 0, "beta2": 0.5}, np_zo_adam),
    ("zo_adamm", {}, np_zo_adamm),
    ("zo_adamm", {"amsgrad": False}, np_zo_adamm),
    ("radazo", {}, np_radazo),
    ("radazo", {"beta1": 0.0}, np_radazo),
    ("radazo", {"bias_correction": True}, np_radazo),
    ("meazo", {}, np_meazo),
    ("meazo", {"beta": 0.9, "moment": "printed"}, np_meazo),
    ("meazo", {"literal": True}, np_meazo),
    ("conmezo", {}, np_conmezo),
    ("conmezo", {"theta": 1.2, "beta": 0.95, "warmup": 200}, np_conmezo),
    ("fzoo", {}, np_fzoo),
    ("hizoo", {}, np_hizoo),
    ("hizoo", {"a": 1e-4}, np_hizoo),
]
# One of each rule and each of its sets of slots: enough where the arithmetic is not what is tested.
KINDS = [
    case
    for case in CASES
    if not case[1] or set(case[1]) & {"momentum", "amsgrad", "bias_correction", "a", "nu", "conservative"}
]


def name_of(case: tuple) -> str:
    return rules.get(case[0], **case[1]).name + "".join(f" {k}={v}" for k, v in case[1].items())


assert {name for name, *_ in CASES} == set(rules.REGISTRY), "every registered rule has a reference"
