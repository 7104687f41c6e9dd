"""Programs of toy models, and the questions that tests of passes ask about them."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zowrap
from zowrap.compiler.capture import capture
from zowrap.compiler.program import Program
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import Batch, LossFn
from zowrap.numerics import noise
from zowrap.passes.manager import Pass, run
from zowrap.passes.select_tunable import SelectTunable
from zowrap.step import lowrank

# --- models -------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Two layers, ``[rows, 3]`` to ``[rows, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def mean_square(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of each row."""
    return model(batch["x"]).square().mean(-1)


def numbers(rows: int = 5, columns: int = 3) -> Batch:
    return {"x": torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))}


def tokens(rows: int = 5, length: int = 7, vocabulary: int = 9) -> Batch:
    draw = torch.Generator().manual_seed(rows)
    return {name: torch.randint(vocabulary, (rows, length), generator=draw) for name in ("ids", "labels")}


def wrap(model: nn.Module, loss_fn: LossFn = mean_square, rule: Any = "zo_sgd", **options: Any) -> zowrap.ZOModel:
    """The model under the compiled engine; its weights are the same on every call."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)
    return zowrap.zo_wrap(model, rule, loss_fn=loss_fn, engine="compiled", **options)


def captured(zm: zowrap.ZOModel, batch: Batch, *passes: Pass) -> Program:
    """The loss of a batch as a program, after ``passes``."""
    return run(capture(zm.job.loss, batch), passes)


def after(program: Program, *passes: Pass) -> Program:
    """A copy of the program that the passes have gone over; the program itself stays as it is."""
    return run(program.clone(), passes)


def select(zm: zowrap.ZOModel, points: int = 2, block: int = 0, scalars: Sequence[str] = ()) -> SelectTunable:
    """The pass that perturbs the parameters of one block."""
    return SelectTunable(zm.job, block, kernels_of(zm), points, list(scalars))


def kernels_of(zm: zowrap.ZOModel) -> str:
    """The name of the kernels that draw the model's noise."""
    return zm.engine.kernels.key


# --- operators and text -------------------------------------------------------------------------------------------


def operators(program: Program) -> Counter[str]:
    """How often each operator occurs: ``aten.linear``, ``zowrap.perturb``, ``getitem``."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = (str(t) if isinstance(t, torch._ops.OpOverload) else t.__name__ for t in targets)
    return Counter(name.removesuffix(".default") for name in names)


def change(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """By how much the count of each operator differs, without the operators whose count is the same."""
    names = sorted({*before, *after})
    return {name: after.get(name, 0) - before.get(name, 0) for name in names if after.get(name) != before.get(name)}


def printed(program: Program, zm: zowrap.ZOModel) -> str:
    """The program as ``inspect`` prints it after its last pass, in short names and without what only frees memory."""
    text = re.sub(r";  .*", "", program.history[-1][1])
    text = text.replace(repr(kernels_of(zm)), "KERNELS").replace("torch.ops.", "")
    text = re.sub(r"\b[pb]_model_|self, ", "", text)
    return re.sub(r"[._]default(?![a-z])", "", text).strip()


# --- values -------------------------------------------------------------------------------------------------------


def evaluate(program: Program, zm: zowrap.ZOModel, batch: Batch, **given: Tensor) -> list[Tensor]:
    """The outputs of the program: the losses of its points, and the weights of the rows.

    Weights, buffers and the rule's state are the model's own. The inputs that passes have added (keys, scale,
    coefficients, factors) are ``given``, or else made by :func:`drawn`.
    """
    loss = zm.job.loss
    named: dict[str, Any] = {**dict(loss.named_parameters(remove_duplicate=False)), **dict(loss.named_buffers())}
    sources = {"batch": batch, "constant": program.constants, "added": given}
    values = []
    for each, fake in zip(program.inputs, program.fakes(), strict=True):
        source = sources.get(each.kind, named)
        values.append(source[each.target] if each.target in source else drawn(each.target, fake.shape, fake.dtype))
    return list(program(values))


def drawn(target: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A value for an input that a pass has added: the same for every program that has it."""
    if target == "scale":
        return torch.ones(())
    if target == "coefficients":
        return torch.linspace(0.1, -0.1, *shape)
    draw = torch.Generator().manual_seed(zlib.crc32(target.encode()))
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, tuple(shape), dtype=dtype, generator=draw)
    return torch.randn(tuple(shape), generator=draw)


def noise_directions(zm: zowrap.ZOModel) -> list[Tensor]:
    """The direction of each parameter under the keys that :func:`drawn` makes."""
    keys = drawn("keys", (len(zm.parameters), 2), torch.int32)
    return [noise.draw("gaussian", key, p.tensor.shape) for key, p in zip(keys, zm.parameters, strict=True)]


def factor_directions(zm: zowrap.ZOModel, factors: Tensor | None = None) -> list[Tensor]:
    """The direction of each parameter that low-rank factors span, by default those that :func:`drawn` makes."""
    (layout,) = zm.job.layouts
    factors = drawn("factors", (layout.size,)) if factors is None else factors
    places = [layout.places[i] for i in range(len(zm.parameters))]
    return [
        lowrank.product(place.left_of(factors), place.right_of(factors), p.tensor.shape)
        for place, p in zip(places, zm.parameters, strict=True)
    ]


@torch.no_grad()
def moved_losses(
    zm: zowrap.ZOModel, batch: Batch, directions: Sequence[Tensor], coefficients: Tensor | None = None
) -> list[Tensor]:
    """The oracle: the loss of plain copies of the weights, moved along ``directions`` by each coefficient.

    By default these are the two that :func:`drawn` makes.
    """
    losses = []
    for coefficient in drawn("coefficients", (2,)) if coefficients is None else coefficients:
        copies = {
            f"model.{name}": (p.tensor + coefficient * z).to(p.tensor.dtype)
            for p, z in zip(zm.parameters, directions, strict=True)
            for name in p.names
        }
        with evaluation_mode(zm.job.loss):
            losses.append(torch.func.functional_call(zm.job.loss, copies, (batch,), tie_weights=False)[0])
    return losses


def close(got: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> bool:
    return len(got) == len(expected) and all(
        torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(got, expected, strict=True)
    )


def equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
