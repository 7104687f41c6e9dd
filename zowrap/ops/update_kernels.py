"""The kernel of a rule's update: ĝ, rule, rounding and write in one loop over a parameter.

The kernel is an ordinary function over flat tensors, traced together with the reference noise and the rule's own
functions. Noise and ĝ exist only inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zowrap.numerics import noise
from zowrap.numerics.dtypes import is_16_bit
from zowrap.ops.arguments import DrawnDirections, NoiseArgs, UpdateArgs
from zowrap.ops.loops import Loops, flat_index, offset, segments, split
from zowrap.ops.perturb_kernels import PerturbKernels
from zowrap.rules.base import Rule
from zowrap.step.arithmetic import evaluated_direction, update_leaf


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
        drawn, given = (None, [along]) if isinstance(along, Tensor) else (along, [])
        names = [name for name in self.coefficient_shapes if drawn is not None or name != "g"]
        queries, scalars = (0, 0) if drawn is None else (len(drawn.keys), len(drawn.scalars))
        counts = (1, len(args.slots), len(given), queries, queries, scalars, len(names), 6, drawn is not None)
        rounds = is_16_bit(w)

        def kernel(*inputs: Tensor) -> tuple:
            (w,), slots, given, keys, scales, scalars, values, numbers, tables = split(inputs, *counts)
            lr, eps, weight_decay, rounding_key, apply, offset = numbers
            coefficients = dict(zip(names, values, strict=True))
            if drawn is None:
                z = list(given)
                bits = noise.hash_bits(*flat_index(w, offset), rounding_key) if rounds else None
                coefficients["g"] = torch.ones(1, device=w.device)
            else:
                low, high = flat_index(w, offset)
                seen = self._seen(slots)
                each = [NoiseArgs(seen, key, scale, scalars) for key, scale in zip(keys, scales, strict=True)]
                z = [self.perturbation.direction_at(w, low, high, noise_args, tables[0]) for noise_args in each]
                z = [evaluated_direction(w, direction, eps, self.other) for direction in z]
                bits = noise.hash_bits(low, high, rounding_key) if rounds else None
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

    def _seen(self, slots: Sequence[Tensor]) -> list[Tensor]:
        """Select those of a parameter's slots that the rule's direction reads."""
        names = self.rule.slot_names("element")
        return [slots[names.index(name)] for name in self.perturbation.slot_names]
