"""Kernels that draw a direction and perturb weights along it, in one loop over a parameter.

Each kernel is an ordinary function over flat tensors, traced together with the reference noise and the rule's
direction. Noise and perturbed weights exist only in a small scratch buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, compile_function
from zowrap.numerics import noise as laws
from zowrap.numerics.dtypes import at_least_float32
from zowrap.ops.arguments import NoiseArgs
from zowrap.ops.loops import Loops, flat_index, offset, segments, split
from zowrap.ops.scratch import buffers
from zowrap.rules.base import Rule
from zowrap.step.arithmetic import perturb_weight
from zowrap.step.directions import Direction, integer_squares
from zowrap.step.lowrank import Layout, draw


class PerturbKernels:
    """The kernels that draw and apply the directions of one rule.

    Args:
        scalar_names: names of the numbers that the rule's direction reads, in the order they are passed: the step's
            numbers first, then the rule's ``"parameter"`` slots.
    """

    def __init__(self, rule: Rule, direction: Direction, scalar_names: Sequence[str], loops: Loops) -> None:
        self.rule, self.direction, self.scalar_names = rule, direction, list(scalar_names)
        self.slot_names = [name for name in rule.direction_slots if rule.slots[name].kind == "element"]
        self._loops = loops
        self._factors: dict[torch.device, Compiled] = {}

    # --- traced functions -------------------------------------------------------------------------------------

    def direction_at(self, w: Tensor, low: Tensor, high: Tensor, noise: NoiseArgs, table: Tensor) -> Tensor:
        """Compute z for some elements of a parameter.

        Args:
            low, high: int32 halves of the element numbers.
        """
        u = laws.LAWS[self.direction.law](laws.hash_bits(low, high, noise.key), table)
        if self.direction.needs_norm:
            u = u * noise.scale
        numbers = dict(zip(self.scalar_names, noise.scalars, strict=True))
        own = {name: numbers.pop(name) for name in self.rule.slot_names("parameter")}
        seen = {**dict(zip(self.slot_names, noise.slots, strict=True)), **own}
        return self.rule.direction(u, at_least_float32(w), seen, numbers)

    def points(
        self, w: Tensor, low: Tensor, high: Tensor, noise: NoiseArgs, coefficients: Tensor, table: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute ``w + coefficients[p] · z`` for every point, elementwise; see :meth:`direction_at`."""
        z = self.direction_at(w, low, high, noise, table)
        return tuple(perturb_weight(w, z, coefficients[p]) for p in range(coefficients.shape[0]))

    # --- kernels ----------------------------------------------------------------------------------------------

    def write(self, w: Tensor, noise: NoiseArgs, coefficients: Tensor, out: Sequence[Tensor], start: int = 0) -> None:
        """Set ``out[p] = w + coefficients[p] · z`` for a parameter's elements from number ``start`` on.

        Args:
            w: flat, as are the slots of ``noise``.
            coefficients: float32 ``[points]``.
            out: one flat tensor for each point.
        """
        slot_count, points = len(self.slot_names), len(out)

        def kernel(*inputs: Tensor) -> tuple:
            counts = (1, slot_count, points, 2, len(self.scalar_names), 3)
            (w,), slots, out, (key, scale), scalars, (coefficients, offset, table) = split(inputs, *counts)
            low, high = flat_index(w, offset)
            values = self.points(w, low, high, NoiseArgs(slots, key, scale, scalars), coefficients, table)
            for out_p, value in zip(out, values, strict=True):
                out_p.copy_(value)
            return ()

        table = laws.gaussian_table(w.device)
        for first, run in segments(start, w.numel()):
            arrays = [t[run] for t in (w, *noise.slots, *out)]
            small = [*noise.numbers(), coefficients, offset(first, w.device), table]
            self._loops.run(("perturb", w.dtype, points), kernel, arrays, small)

    def chunks(
        self, w: Tensor, noise: NoiseArgs, coefficients: Tensor, runs: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Yield ``(first, last, perturbed rows for each point)`` for each run of rows of a matrix.

        The perturbed rows lie in a scratch buffer that the next run overwrites.

        Args:
            w: ``[rows, columns]``, as are the slots of ``noise``.
            runs: ``(first, last)`` row numbers.
        """
        columns, points = w.shape[1], coefficients.shape[0]
        flat, flat_noise = w.reshape(-1), noise.flat()
        for first, last in runs:
            start, end = first * columns, last * columns
            scratch = [s[: end - start] for s in buffers("weights", w.dtype, w.device, points, end - start)]
            self.write(flat[start:end], flat_noise.part(start, end), coefficients, scratch, start)
            yield first, last, [part.view(last - first, columns) for part in scratch]

    def rows(self, w: Tensor, noise: NoiseArgs, coefficients: Tensor, ids: Tensor) -> list[Tensor]:
        """Compute rows of a matrix w + coefficients[p] · z, drawing noise for these rows only.

        Args:
            w: the gathered rows, ``[touched, columns]``; the slots of ``noise`` are gathered likewise.
            ids: row numbers in the full matrix, int64 ``[touched]``.

        Returns:
            One tensor of ``w``'s shape and dtype for each point.
        """
        slot_count, points = len(self.slot_names), coefficients.shape[0]

        def kernel(*inputs: Tensor) -> tuple:
            counts = (2, slot_count, 2, len(self.scalar_names), 2)
            (w, ids), slots, (key, scale), scalars, (coefficients, table) = split(inputs, *counts)
            columns = torch.arange(w.shape[1], dtype=torch.int64, device=w.device)
            low, high = laws.split_index(ids.unsqueeze(1) * w.shape[1] + columns)
            return self.points(w, low, high, NoiseArgs(slots, key, scale, scalars), coefficients, table)

        small = [*noise.numbers(), coefficients, laws.gaussian_table(w.device)]
        return list(self._loops.run(("rows", w.dtype, points), kernel, [w, ids, *noise.slots], small))

    def factors(self, layout: Layout, keys: Tensor, right_keys: Tensor) -> Tensor:
        """Run :func:`zowrap.step.lowrank.draw` in one loop, for any number of directions and parameters."""
        table = laws.gaussian_table(keys.device)
        out = torch.empty(keys.shape[0], layout.size, device=keys.device)
        given = (out, layout.owner, layout.start, layout.scale, keys, right_keys)
        if keys.device not in self._factors:

            def kernel(*inputs: Tensor) -> tuple:
                draw(*inputs)
                return ()

            sizes = ((3, 64), (7,), (10,), (10,), (3, 5, 2), (3, 5, 2))
            examples = [t.new_zeros(size) for t, size in zip(given, sizes, strict=True)]
            self._factors[keys.device] = compile_function(kernel, [*examples, table], range(6), fixed=(2,))
        self._factors[keys.device](*given, table)
        return out

    def squared_norm(self, like: Tensor, key: Tensor) -> Tensor:
        """Sum :func:`zowrap.step.directions.integer_squares` over a flat parameter's raw noise, as 0-d int64."""
        table = laws.gaussian_table(like.device)

        def kernel(like: Tensor, key: Tensor, offset: Tensor, table: Tensor) -> tuple:
            low, high = flat_index(like, offset)
            u = laws.LAWS[self.direction.law](laws.hash_bits(low, high, key), table)
            return (integer_squares(u).sum(),)

        total = torch.zeros((), dtype=torch.int64, device=like.device)
        for first, run in segments(0, like.numel()):
            small = [key, offset(first, like.device), table]
            total = total + self._loops.run(("norm", like.dtype), kernel, [like[run]], small)[0]
        return total
