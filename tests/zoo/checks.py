"""Check one family: its loss, its two points, its saved model, and the compiled engine against the eager one.

Each check raises ``AssertionError``, or the error of the product where it refuses.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zowrap
from tests.zoo import tiny

EPS, LR = 1e-2, 1e-2
# Of losses near 5 in float32, whose sums are taken in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def wrap(model: nn.Module, engine: str) -> zowrap.ZOModel:
    return zowrap.zo_wrap(model, "zo_sgd", lr=LR, eps=EPS, engine=engine)


def close(found: Tensor, expected: Tensor, of: str) -> None:
    found, expected = found.detach().double(), expected.detach().double()
    assert torch.allclose(found, expected, **TOLERANCE), f"{of}: {found.tolist()}, expected {expected.tolist()}"


@torch.no_grad()
def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself returns, 0-d."""
    loss = model(**batch).loss
    return loss if loss.ndim == 0 else loss.mean()


def check_eager(family: str, folder: Path) -> None:
    """The loss at θ is the model's own, both points are those of copies moved by hand, and a saved model is the same.

    A step with projected gradient 1 moves the weights by −lr · z, which gives z itself.
    """
    model = tiny.make(family)
    batch = tiny.batch(family, model)
    start = copy.deepcopy(model)
    expected = own_loss(start, batch)
    zm = wrap(model, "eager")
    close(zm.loss(**batch), expected, "the loss at θ")
    zm.accumulate(**batch)
    losses = zm.peek()[0]
    zm.update(projected_grad=torch.ones(()))
    moved = dict(model.named_parameters())
    for sign, loss in zip((1, -1), losses, strict=True):
        point = copy.deepcopy(start)
        with torch.no_grad():
            for name, parameter in point.named_parameters():
                parameter.add_(parameter - moved[name], alpha=sign * EPS / LR)
        close(loss, own_loss(point, batch), f"the loss at θ {sign * EPS:+} z")
    zm.save_pretrained(str(folder))
    again = type(model).from_pretrained(folder).eval()
    saved = model.state_dict()
    different = [name for name, tensor in again.state_dict().items() if not torch.equal(tensor, saved[name])]
    assert not different, f"saved and loaded again, {', '.join(different)} differ"
    close(own_loss(again, batch), own_loss(model, batch), "the loss of the saved model")


def check_compiled(family: str) -> dict[str, Any]:
    """Three steps on batches of two sizes come to the eager engine's losses and weights.

    Returns:
        ``programs``, how many captures the two sizes needed.
    """
    engines = {}
    for engine in ("eager", "compiled"):
        model = tiny.make(family)
        engines[engine] = wrap(model, engine)
    for step, (rows, length) in enumerate(((3, 12), (4, 15), (3, 12))):
        batch = tiny.batch(family, engines["eager"].model, rows, length, seed=step)
        losses = []
        for zm in engines.values():
            zm.accumulate(**batch)
            losses.append(zm.peek()[0])
        close(losses[1], losses[0], f"step {step}")
        for zm in engines.values():
            zm.lr = 1e-3
            zm.update(losses=losses[0])
    fast = engines["compiled"]
    assert fast.engine.fallen_back is None, fast.engine.fallen_back
    return {"programs": len(fast.engine.executables)}
