"""Define the estimators: the points at which a step evaluates the loss, and the projected gradients they give.

A point is θ + coefficient · ε · z_direction. With f the loss on one minibatch, the same for every point of a step:

================  ==========================  ==================================  ===========
name              points                      projected gradient                  forwards
================  ==========================  ==================================  ===========
central           θ + εz_i, θ − εz_i          [f(θ+εz_i) − f(θ−εz_i)] / 2ε        2q
forward           θ, θ + εz_i                 [f(θ+εz_i) − f(θ)] / ε              q + 1
population        θ ± εz_b for example b      [f_b(θ+εz_b) − f_b(θ−εz_b)] / 2ε    2, batched
grzo              as in a population          the same, over its spread           2, batched
residual          θ                           rms(G), G from the program's flow   1.4, or 2.4
forward_gradient  θ                           ∇f(θ)·z_i, exactly                  q with jvp
================  ==========================  ==================================  ===========

and ĝ = mean over i of g_i z_i (n-SPSA; Spall 1992, Malladi et al. 2305.17333). In a population every example of the
batch has its own direction and its own loss f_b, weighted by its share of the label tokens; ``grzo`` divides their
projected gradients by their standard deviation over the batch (Tan et al. 2606.02857). ``residual`` draws no
directions: it is forward-only without being zeroth-order, see :mod:`zowrap.step.credit`. ``forward_gradient``
(Baydin et al. 2202.08587) is a reference without the error of ε: it runs on the eager engine, by forward-mode
differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zowrap.errors import Option, ZOError, nearest


class Point(NamedTuple):
    """One evaluation: θ + ``coefficient`` · ε · z of ``direction``. Coefficient 0 is θ itself."""

    direction: int
    coefficient: float


@dataclass(frozen=True)
class Estimator:
    """How losses give projected gradients.

    Attributes:
        name: the name of the option.
        points: ``points(queries)`` lists the evaluations of one step, in order.
        project: ``project(losses, eps) -> [directions]`` projected gradients; ``losses`` float32 ``[points]``, or
            ``[points, examples]`` with ``per_example``.
        per_example: each example has its own direction.
        credit: the engine assigns residual credit, because losses alone do not give projected gradients.
        exact: the engine differentiates along the directions, because losses alone do not give projected gradients.
    """

    name: str
    points: Callable[[int], list[Point]]
    project: Callable[[Tensor, Tensor], Tensor]
    per_example: bool = False
    credit: bool = False
    exact: bool = False


def _central_points(queries: int) -> list[Point]:
    return [Point(i, sign) for i in range(queries) for sign in (1.0, -1.0)]


def _central_project(losses: Tensor, eps: Tensor) -> Tensor:
    return (losses[0::2] - losses[1::2]) / (2 * eps)


def _forward_points(queries: int) -> list[Point]:
    return [Point(0, 0.0)] + [Point(i, 1.0) for i in range(queries)]


def _forward_project(losses: Tensor, eps: Tensor) -> Tensor:
    return (losses[1:] - losses[0]) / eps


def _population_project(losses: Tensor, eps: Tensor) -> Tensor:
    return (losses[0] - losses[1]) / (2 * eps)


def _group_relative_project(losses: Tensor, eps: Tensor) -> Tensor:
    """Projected gradients of a population over their standard deviation, the mean not taken off (2606.02857).

    The paper's estimate also has the factor 1/2ε, which is part of η here. Of a single example, and where all are
    equal, the size is taken in place of the deviation. An example without labels has the projected gradient 0.
    """
    g = _population_project(losses, eps)
    count = g.shape[0]
    deviation = ((g - g.mean()).square().sum() / max(count - 1, 1)).sqrt()
    size = g.square().mean().sqrt()
    return torch.where(g != 0, g / torch.where(deviation > 1e-6 * size, deviation, size), 0.0)


def _at_theta(queries: int) -> list[Point]:
    return [Point(0, 0.0)]


def _exact_points(queries: int) -> list[Point]:
    return [Point(i, 0.0) for i in range(queries)]


def _supplied(losses: Tensor, eps: Tensor) -> Tensor:
    return torch.full_like(losses, torch.nan)  # the engine supplies them; no difference of losses does


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator("central", _central_points, _central_project),
        Estimator("forward", _forward_points, _forward_project),
        Estimator("population", _central_points, _population_project, per_example=True),
        Estimator("grzo", _central_points, _group_relative_project, per_example=True),
        Estimator("residual", _at_theta, _supplied, credit=True),
        Estimator("forward_gradient", _exact_points, _supplied, exact=True),
    )
}


def get_estimator(name: str) -> Estimator:
    """The estimator called ``name``.

    Raises:
        ZOError: there is none; the message suggests the nearest name.
    """
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ZOError("unknown ", Option("estimator"), f" {name!r}{nearest(str(name), ESTIMATORS)}")
    return ESTIMATORS[name]


def mean_loss(losses: Tensor) -> Tensor:
    """The loss that a step reports: the mean over its evaluations (f(θ+εz) alone would be biased). 0-d float32."""
    return losses.to(torch.float32).mean()
