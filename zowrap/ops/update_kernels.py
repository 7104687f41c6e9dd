"""The kernel of a rule's update: ĝ, rule, rounding and write in one loop over a parameter.

The kernel is an ordinary function over flat tensors, traced together with the reference noise and the rule's own
functions. Noise and ĝ exist only inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zowrap.custom_op import PersistentBuffers
from zowrap.numerics import noise
from zowrap.numerics.dtypes import is_16_bit
from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs
from zowrap.ops.loops import Loops, flat_index, offset, segments, split
from zowrap.ops.perturb_kernels import PerturbKernels
from zowrap.ops.scratch import MOST_ELEMENTS, buffers
from zowrap.rules.base import Rule, combine
from zowrap.step.arithmetic import evaluated_direction, update_leaf

# The most directions that one kernel draws. Its code grows with them: the C++ compiler took three minutes for 128, and
# a few seconds for 8.
MOST_DIRECTIONS = 8


class UpdateKernels:
    """The kernels of one rule's update.

    Args:
        perturbation: draws the directions again.
        coefficient_shapes: shapes of the rule's coefficients, in the order they are passed.
        other: see :func:`zowrap.step.arithmetic.evaluated_direction`.
    """

    def __init__(
        self,
        rule: Rule,
        perturbation: PerturbKernels,
        coefficient_shapes: Mapping[str, Sequence[int]],
        other: float | None,
        loops: Loops,
    ) -> None:
        self.rule, self.perturbation, self.other = rule, perturbation, other
        self.coefficient_shapes = coefficient_shapes
        self._loops = loops

    def write(self, w: Tensor, args: UpdateArgs, along: DrawnDirections | Tensor, start: int = 0) -> None:
        """Write the rule's update of a parameter's elements from number ``start`` on, in place.

        Args:
            w: flat weights; the slots of ``args`` are flat too.
            along: the directions that ĝ is a combination of, or ĝ itself, flat float32. ĝ is given for low-rank
                directions, where it is a thin matrix product.
        """
        if isinstance(along, DrawnDirections) and self.in_groups(len(along.keys)):
            return self._write_in_groups(w, args, along, start)
        drawn, given = (None, [along]) if isinstance(along, Tensor) else (along, [])
        names = [name for name in self.coefficient_shapes if drawn is not None or name != "g"]
        queries, scalars = (0, 0) if drawn is None else (len(drawn.keys), len(drawn.scalars))
        counts = (1, len(args.slots), len(given), queries, queries, scalars, len(names), 6, drawn is not None)
        rounds = is_16_bit(w)

        def kernel(*inputs: Tensor) -> tuple:
            (w,), slots, given, keys, scales, scalars, values, numbers, tables = split(inputs, *counts)
            lr, eps, weight_decay, rounding_key, apply, offset = numbers
            coefficients = dict(zip(names, values, strict=True))
            place = flat_index(w, offset)
            bits = noise.hash_bits(*place, rounding_key) if rounds else None
            if drawn is None:
                z = list(given)
                coefficients["g"] = torch.ones(1, device=w.device)
            else:
                again = DrawnDirections(keys, scales, scalars)
                z = self._directions_at(w, place, self._seen(slots), again, eps, tables[0])
            named = dict(zip(self.rule.element_slots(w.dtype), slots, strict=True))
            hyper = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
            new_w, new_slots = update_leaf(self.rule, w, z, named, coefficients, hyper, apply, bits, args.decay)
            w.copy_(new_w)
            for name, value in new_slots.items():
                named[name].copy_(value)
            return ()

        name = ("along", w.dtype, args.decay) if drawn is None else ("update", w.dtype, queries, args.decay)
        directions = [] if drawn is None else [*drawn.keys, *drawn.scales, *drawn.scalars]
        tables = [] if drawn is None else [noise.gaussian_table(w.device)]
        for first, run in segments(start, w.numel()):
            arrays = [t[run] for t in (w, *args.slots, *given)]
            numbers = [*args.hyper, args.rounding_key, args.apply, offset(first, w.device)]
            self._loops.run(name, kernel, arrays, [*directions, *args.coefficients, *numbers, *tables])

    def in_groups(self, queries: int) -> bool:
        """Whether ĝ is summed up in a buffer, :data:`MOST_DIRECTIONS` of the directions at a time."""
        return queries > MOST_DIRECTIONS and not self.rule.leaf_takes_directions

    def persistent_buffers(self, elements: int, queries: int) -> PersistentBuffers:
        """What :meth:`write` keeps for the next call, of a parameter of so many elements and so many directions."""
        if not self.in_groups(queries):
            return {}
        return {("gradient", torch.float32, 1): 4 * min(elements, MOST_ELEMENTS)}

    def _write_in_groups(self, w: Tensor, args: UpdateArgs, along: DrawnDirections, start: int) -> None:
        at = list(self.coefficient_shapes).index("g")
        others = [*args.coefficients[:at], *args.coefficients[at + 1 :]]
        size = min(w.numel(), MOST_ELEMENTS)
        (scratch,) = buffers("gradient", torch.float32, w.device, 1, size)
        for first in range(0, w.numel(), max(size, 1)):
            last = min(first + size, w.numel())
            g, part = scratch[: last - first], args.part(first, last)
            # Adding to −0 changes no number, not even a −0: the sum has the bits of one that starts with its summand.
            g.fill_(-0.0)
            for i in range(0, len(along.keys), MOST_DIRECTIONS):
                group = slice(i, i + MOST_DIRECTIONS)
                some = DrawnDirections(along.keys[group], along.scales[group], along.scalars)
                self._add_directions(w[first:last], part, some, args.coefficients[at][group], g, start + first)
            self.write(w[first:last], part._replace(coefficients=others), g, start + first)

    def _add_directions(
        self, w: Tensor, args: UpdateArgs, along: DrawnDirections, coefficients: Tensor, g: Tensor, start: int
    ) -> None:
        """Add Σ_i coefficients[i] · z_i to ``g``, float32 of ``w``'s shape."""
        seen = self._seen(args.slots)
        counts = (2, len(seen), len(along.keys), len(along.keys), len(along.scalars), 4)

        def kernel(*inputs: Tensor) -> tuple:
            (w, g), seen, keys, scales, scalars, (coefficients, eps, offset, table) = split(inputs, *counts)
            place, drawn = flat_index(w, offset), DrawnDirections(keys, scales, scalars)
            g.copy_(combine(coefficients, self._directions_at(w, place, seen, drawn, eps, table), g))
            return ()

        directions, table = [*along.keys, *along.scales, *along.scalars], noise.gaussian_table(w.device)
        for first, run in segments(start, w.numel()):
            small = [*directions, coefficients, args.hyper[1], offset(first, w.device), table]
            self._loops.run(("add", w.dtype, len(along.keys)), kernel, [t[run] for t in (w, g, *seen)], small)

    def _directions_at(
        self,
        w: Tensor,
        place: tuple[Tensor, Tensor],
        seen: Sequence[Tensor],
        drawn: DrawnDirections,
        eps: Tensor,
        table: Tensor,
    ) -> list[Tensor]:
        """The directions that an update takes, at the elements with the numbers ``place``."""
        each = [NoiseArgs(seen, k, scale, drawn.scalars) for k, scale in zip(drawn.keys, drawn.scales, strict=True)]
        z = [self.perturbation.direction_at(w, *place, noise_args, table) for noise_args in each]
        return [evaluated_direction(w, direction, eps, self.other) for direction in z]

    def _seen(self, slots: Sequence[Tensor]) -> list[Tensor]:
        """Select those of a parameter's slots that the rule's direction reads."""
        names = self.rule.slot_names("element")
        return [slots[names.index(name)] for name in self.perturbation.slot_names]
