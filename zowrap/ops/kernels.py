"""The kernels of a run, which perturb and update its weights.

All runs with the same :func:`kernel_key` share kernels. The key is a text that determines the kernels' arithmetic, so
programs can refer to kernels by it, and processes can share caches.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs
from zowrap.ops.loops import Loops
from zowrap.ops.perturb_kernels import PerturbKernels
from zowrap.ops.update_kernels import UpdateKernels
from zowrap.rules.base import Rule
from zowrap.step.directions import Direction


class Kernels:
    """The kernels of one key, compiled on first use for each dtype and number of points.

    Args:
        coefficient_shapes: shapes of the rule's coefficients, in the order they are passed.
        scalar_names: names of the numbers that the rule's direction reads, in the order they are passed: the step's
            numbers first, then the rule's ``"parameter"`` slots.
        other: see :func:`zowrap.step.arithmetic.evaluated_direction`.

    Attributes:
        key: the text by which programs refer to these kernels.
        perturbation: draws directions and perturbs weights along them.
        update: writes the rule's update.
        loops: the compiled functions; other operators add theirs.
    """

    def __init__(
        self,
        rule: Rule,
        direction: Direction,
        coefficient_shapes: Mapping[str, Sequence[int]],
        scalar_names: Sequence[str],
        other: float | None = None,
    ) -> None:
        self.rule, self.direction = rule, direction
        self.key = kernel_key(rule, direction, coefficient_shapes, scalar_names, other)
        self.loops = Loops()
        self.perturbation = PerturbKernels(rule, direction, scalar_names, self.loops)
        self.update = UpdateKernels(rule, self.perturbation, coefficient_shapes, other, self.loops)

    def warm(
        self, dtype: torch.dtype, device: torch.device, queries: int, points: int, decay: bool, rows: bool, size: int
    ) -> None:
        """Compile the kernels for parameters of ``dtype`` by running them on a dummy, so that no step fails half-way.

        Args:
            points: points of an evaluation; 0 compiles only the update.
            rows: whether an embedding is perturbed.
            size: elements of the dummy, see :func:`zowrap.ops.loops.alike`.
        """
        w, one = torch.zeros(size, dtype=dtype, device=device), torch.ones((), device=device)
        key = torch.zeros(2, dtype=torch.int32, device=device)
        slots = [torch.ones(size, device=device) for _ in self.rule.element_slots(dtype)]
        lowrank = self.direction.lowrank is not None
        shapes = {name: tuple(shape) for name, shape in self.update.coefficient_shapes.items()}
        values = [torch.ones(shape, device=device) for name, shape in shapes.items() if not (lowrank and name == "g")]
        args = UpdateArgs(slots, key, values, [one] * 3, one > 0, decay)
        if lowrank:
            return self.update.write(w, args, torch.ones(size, device=device))
        scalars = [one] * len(self.perturbation.scalar_names)
        noise = NoiseArgs([torch.ones(size, device=device) for _ in self.perturbation.slot_names], key, one, scalars)
        coefficients = torch.zeros(points, device=device)
        if self.direction.needs_norm:
            self.perturbation.squared_norm(w, key)
        if points:
            self.perturbation.write(w, noise, coefficients, [w.clone() for _ in range(points)])
        if points and rows:
            ids = torch.zeros(1, dtype=torch.int64, device=device)
            table = noise._replace(slots=[slot.view(1, size) for slot in noise.slots])
            self.perturbation.rows(w.view(1, size), table, coefficients, ids)
        return self.update.write(w, args, DrawnDirections([key] * queries, [one] * queries, scalars))


_unknown: dict[Hashable, int] = {}  # rules with an origin that is not a text, numbered in order of appearance


def kernel_key(
    rule: Rule,
    direction: Direction,
    coefficient_shapes: Mapping[str, Sequence[int]],
    scalar_names: Sequence[str],
    other: float | None,
) -> str:
    """Return a text that determines the arithmetic of kernels; the arguments are those of :class:`Kernels`.

    The rule's functions are identified by its :attr:`~zowrap.rules.base.Rule.origin`: rules from outside the package
    always differ from each other, even with equal names. From the direction, kernels depend on its law, on whether
    its length is scaled and on whether it is low-rank; its changes to the rule are part of the rule's origin.
    """
    origin = rule.origin
    if not isinstance(origin, str):
        origin = f"{rule.describe()} #{_unknown.setdefault(origin, len(_unknown))}"
    form = "lowrank" if direction.lowrank is not None else "scaled" if direction.needs_norm else "plain"
    shapes = " ".join(f"{name}{list(shape)}" for name, shape in coefficient_shapes.items())
    return f"{origin} law={direction.law} {form} coefficients={shapes} numbers={list(scalar_names)} other={other}"


_registry: dict[str, Kernels] = {}


def register(kernels: Kernels) -> Kernels:
    """Register kernels and return them, or return those already registered under the same key."""
    return _registry.setdefault(kernels.key, kernels)


def get(kernel_key: str) -> Kernels:
    """Return the kernels registered under ``kernel_key``."""
    return _registry[kernel_key]
