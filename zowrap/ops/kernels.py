"""Fused kernels: noise, direction, perturbation or update in one loop over a parameter.

Each kernel is an ordinary function over flat tensors, traced together with the noise reference and the rule's own
functions and compiled once for all sizes. No noise, gradient or perturbed weight exists outside a small scratch.

Kernels are named by a *spec*, a string that determines their arithmetic (rule with its hyper-parameters, direction,
number of queries, weight decay), so that programs can refer to them and caches can be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, compile_function
from zowrap.numerics import noise
from zowrap.numerics.dtypes import at_least_float32, is_16_bit
from zowrap.ops.scratch import buffers
from zowrap.rules.base import Rule
from zowrap.step.arithmetic import perturbed, taken, update_leaf
from zowrap.step.directions import Direction, integer_squares
from zowrap.step.lowrank import Layout, draw

# Largest run of elements handled by one call. It divides 2³², so the high half of the element index is constant within
# a call, and it fits an int32 counter.
SEGMENT = 1 << 30
_EXAMPLE = 4096  # elements of the tensors that kernels are traced with; a size hint, nothing else depends on it


class Kernels:
    """The kernels of one spec. Compiled on first use, per dtype and number of points.

    Args:
        coefficient_shapes: the rule's coefficients, in the order they are passed.
        scalar_names: numbers that the rule's direction reads, in the order they are passed: global ones, then the
            rule's ``"parameter"`` slots.
        other: see :func:`zowrap.step.arithmetic.taken`.
    """

    def __init__(
        self,
        rule: Rule,
        direction: Direction,
        coefficient_shapes: Mapping[str, Sequence[int]],
        scalar_names: Sequence[str],
        other: float | None = None,
    ) -> None:
        self.rule = rule
        self.other = other
        self.direction_law = direction
        self.coefficient_shapes = coefficient_shapes
        self.coefficient_names = list(coefficient_shapes)
        self.scalar_names = list(scalar_names)
        self.slot_names = rule.slot_names("element")
        self.read_names = [name for name in rule.direction_slots if name in self.slot_names]
        self._compiled: dict[tuple, Compiled] = {}

    # --- what is traced ---------------------------------------------------------------------------------------

    def _direction(self, low, high, key, scale, w, slots, scalars, table) -> Tensor:
        u = noise.LAWS[self.direction_law.law](noise.hash_bits(low, high, key), table)
        if self.direction_law.needs_norm:
            u = u * scale
        numbers = dict(zip(self.scalar_names, scalars, strict=True))
        own = {name: numbers.pop(name) for name in self.rule.slot_names("parameter")}
        seen = {**dict(zip(self.read_names, slots, strict=True)), **own}
        return self.rule.direction(u, at_least_float32(w), seen, numbers)

    def points(self, w, low, high, slots, key, scale, scalars, coefficients, table, count: int) -> tuple[Tensor, ...]:
        """``w + coefficients[p] · z`` for so many points, elementwise; ``low``, ``high``: int32 halves of the index."""
        z = self._direction(low, high, key, scale, w, slots, scalars, table)
        return tuple(perturbed(w, z, coefficients[p]) for p in range(count))

    def _flat_index(self, like: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(like.shape[0], dtype=torch.int32, device=like.device) + offset[0], offset[1]

    # --- perturbation -----------------------------------------------------------------------------------------

    def perturb(
        self,
        w: Tensor,
        slots: Sequence[Tensor],
        key,
        scale,
        scalars,
        coefficients,
        out: Sequence[Tensor],
        start: int = 0,
    ) -> None:
        """``out[p] = w + coefficients[p] · z`` for the elements ``start …`` of a parameter, all flat."""
        for first, size in _segments(start, w.numel()):
            a, b = first - start, first - start + size
            part = [out_p[a:b] for out_p in out]
            inputs = [w[a:b], *[s[a:b] for s in slots], *part]
            self._perturb_kernel(
                w.dtype, len(out), inputs, [key, scale, *scalars, coefficients, offset(first, w.device)]
            )

    def perturbed_chunks(
        self,
        w: Tensor,
        slots: Sequence[Tensor],
        key,
        scale,
        scalars,
        coefficients,
        runs: Iterable[tuple[int, int]],
    ) -> Iterator[tuple[int, int, list[Tensor]]]:
        """``(first, last, rows at every point)`` for each run of rows of a matrix; the next run overwrites the scratch.

        Args:
            w: ``[rows, columns]``, ``slots`` likewise.
            runs: ``(first, last)``.
        """
        columns, points = w.shape[1], coefficients.shape[0]
        flat, flat_slots = w.reshape(-1), [s.reshape(-1) for s in slots]
        for first, last in runs:
            span = slice(first * columns, last * columns)
            scratch = buffers("weights", w.dtype, w.device, points, span.stop - span.start)
            parts = [s[: span.stop - span.start] for s in scratch]
            self.perturb(
                flat[span], [s[span] for s in flat_slots], key, scale, scalars, coefficients, parts, span.start
            )
            yield first, last, [part.view(last - first, columns) for part in parts]

    def _perturb_kernel(self, dtype: torch.dtype, points: int, arrays: list[Tensor], small: list[Tensor]) -> None:
        slots = len(self.read_names)
        table = noise.gaussian_table(arrays[0].device)

        def kernel(*inputs: Tensor) -> tuple:
            w, slot_values, out = inputs[0], inputs[1 : 1 + slots], inputs[1 + slots : 1 + slots + points]
            key, scale, *scalars, coefficients, offset, table = inputs[1 + slots + points :]
            low, high = self._flat_index(w, offset)
            values = self.points(w, low, high, slot_values, key, scale, scalars, coefficients, table, points)
            for out_p, value in zip(out, values, strict=True):
                out_p.copy_(value)
            return ()

        self._run(("perturb", dtype, points), kernel, arrays, [*small, table])

    def perturb_rows(
        self, w: Tensor, slots: Sequence[Tensor], rows: Tensor, key, scale, scalars, coefficients, points: int
    ) -> list[Tensor]:
        """Rows of a matrix w + coefficients[p] · z: the noise of the touched rows only.

        Args:
            w: ``[touched, columns]``, already gathered; ``slots`` likewise.
            rows: int64 ``[touched]``, their row numbers in the full matrix.

        Returns:
            ``points`` tensors of ``w``'s shape and dtype.
        """
        count = len(self.read_names)
        table = noise.gaussian_table(w.device)

        def kernel(*inputs: Tensor) -> tuple:
            w, rows, slot_values = inputs[0], inputs[1], inputs[2 : 2 + count]
            key, scale, *scalars, coefficients, table = inputs[2 + count :]
            columns = torch.arange(w.shape[1], dtype=torch.int64, device=w.device)
            low, high = noise.split_index(rows.unsqueeze(1) * w.shape[1] + columns)
            return self.points(w, low, high, slot_values, key, scale, scalars, coefficients, table, points)

        small = [key, scale, *scalars, coefficients, table]
        return list(self._run(("rows", w.dtype, points), kernel, [w, rows, *slots], small))

    def factors(self, layout: Layout, keys: Tensor, right_keys: Tensor) -> Tensor:
        """:func:`zowrap.step.lowrank.draw` in one loop, for any number of directions and parameters."""
        table = noise.gaussian_table(keys.device)
        out = torch.empty(keys.shape[0], layout.size, device=keys.device)
        key = ("factors", keys.device)
        if key not in self._compiled:

            def kernel(*inputs: Tensor) -> tuple:
                draw(*inputs)
                return ()

            sizes = ((3, 64), (7,), (10,), (10,), (3, 5, 2), (3, 5, 2))
            given = (out, layout.owner, layout.start, layout.scale, keys, right_keys)
            examples = [t.new_zeros(size) for t, size in zip(given, sizes, strict=True)]
            self._compiled[key] = compile_function(kernel, [*examples, table], range(6), fixed=(2,))
        self._compiled[key](out, layout.owner, layout.start, layout.scale, keys, right_keys, table)
        return out

    def squared_norm(self, like: Tensor, key: Tensor) -> Tensor:
        """0-d int64 sum of :func:`zowrap.step.directions.integer_squares` over the raw noise of a parameter (flat)."""
        table = noise.gaussian_table(like.device)

        def kernel(like: Tensor, key: Tensor, offset: Tensor, table: Tensor) -> tuple:
            low, high = self._flat_index(like, offset)
            u = noise.LAWS[self.direction_law.law](noise.hash_bits(low, high, key), table)
            return (integer_squares(u).sum(),)

        total = torch.zeros((), dtype=torch.int64, device=like.device)
        for first, size in _segments(0, like.numel()):
            part = like[first : first + size]
            total = total + self._run(("norm", like.dtype), kernel, [part], [key, offset(first, like.device), table])[0]
        return total

    # --- update -----------------------------------------------------------------------------------------------

    def update(
        self,
        w: Tensor,
        slots: Sequence[Tensor],
        keys,
        scales,
        scalars,
        rounding_key,
        coefficients,
        hyper,
        apply,
        decay: bool,
        start: int = 0,
    ) -> None:
        """Write the rule's update of one parameter: noise, rule, rounding and write in one loop.

        Args:
            w: flat weights; ``slots`` flat float32, every slot that the rule has of weights of this dtype.
            keys: int32 ``[2]`` for each query; ``scales``: 0-d float32 for each.
            coefficients: in the order of ``coefficient_names``.
            hyper: ``(lr, eps, weight_decay)``, 0-d float32.
            apply: 0-d bool.
            start: which element of the parameter ``w`` begins with, where it is a part.
        """
        queries, slot_count = len(keys), len(slots)
        rounds = is_16_bit(w)
        reads = [self.slot_names.index(name) for name in self.read_names]
        table = noise.gaussian_table(w.device)

        def kernel(*inputs: Tensor) -> tuple:
            w, slot_values, rest = inputs[0], inputs[1 : 1 + slot_count], list(inputs[1 + slot_count :])
            keys, scales = [rest.pop(0) for _ in range(queries)], [rest.pop(0) for _ in range(queries)]
            scalars = [rest.pop(0) for _ in self.scalar_names]
            coefficients = {name: rest.pop(0) for name in self.coefficient_names}
            lr, eps, weight_decay, rounding_key, apply, offset, table = rest
            low, high = self._flat_index(w, offset)
            seen = [slot_values[i] for i in reads]
            z = [self._direction(low, high, k, s, w, seen, scalars, table) for k, s in zip(keys, scales, strict=True)]
            z = [taken(w, each, eps, self.other) for each in z]
            bits = noise.hash_bits(low, high, rounding_key) if rounds else None
            named = dict(zip(self.rule.element_slots(w.dtype), slot_values, strict=True))
            hyper = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
            new_w, new_slots = update_leaf(self.rule, w, z, named, coefficients, hyper, apply, bits, decay)
            w.copy_(new_w)
            for name, value in new_slots.items():
                named[name].copy_(value)
            return ()

        for first, size in _segments(start, w.numel()):
            a, b = first - start, first - start + size
            arrays = [t[a:b] for t in (w, *slots)]
            small = [
                *keys,
                *scales,
                *scalars,
                *coefficients,
                *hyper,
                rounding_key,
                apply,
                offset(first, w.device),
                table,
            ]
            self._run(("update", w.dtype, queries, decay), kernel, arrays, small)

    def update_along(
        self,
        w: Tensor,
        slots: Sequence[Tensor],
        g: Tensor,
        rounding_key,
        coefficients,
        hyper,
        apply,
        decay: bool,
        start: int = 0,
    ) -> None:
        """Write the rule's update along a given ĝ, float32, for the elements ``start …`` of a parameter, all flat.

        For low-rank directions, whose ĝ is a thin matrix product; ``coefficients`` lack the rule's ``"g"``.
        """
        slot_count = len(slots)
        rounds = is_16_bit(w)
        names = [name for name in self.coefficient_names if name != "g"]

        def kernel(*inputs: Tensor) -> tuple:
            w, slot_values, g = inputs[0], inputs[1 : 1 + slot_count], inputs[1 + slot_count]
            rest = list(inputs[2 + slot_count :])
            coefficients = {name: rest.pop(0) for name in names}
            lr, eps, weight_decay, rounding_key, apply, offset = rest
            bits = noise.hash_bits(*self._flat_index(w, offset), rounding_key) if rounds else None
            named = dict(zip(self.rule.element_slots(w.dtype), slot_values, strict=True))
            hyper = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
            whole = {**coefficients, "g": torch.ones(1, device=w.device)}
            new_w, new_slots = update_leaf(self.rule, w, [g], named, whole, hyper, apply, bits, decay)
            w.copy_(new_w)
            for name, value in new_slots.items():
                named[name].copy_(value)
            return ()

        for first, size in _segments(start, w.numel()):
            a, b = first - start, first - start + size
            arrays = [t[a:b] for t in (w, *slots, g)]
            small = [*coefficients, *hyper, rounding_key, apply, offset(first, w.device)]
            self._run(("along", w.dtype, decay), kernel, arrays, small)

    def warm(
        self, dtype: torch.dtype, device: torch.device, queries: int, points: int, decay: bool, rows: bool, size: int
    ) -> None:
        """Compile what parameters of ``dtype`` need, by running it on a dummy, so that no step stops half-way.

        Args:
            points: of the evaluations; 0 compiles the update alone.
            rows: whether an embedding is perturbed.
            size: elements of the dummy, see :func:`alike`.
        """
        w, one = torch.zeros(size, dtype=dtype, device=device), torch.ones((), device=device)
        key = torch.zeros(2, dtype=torch.int32, device=device)
        slots = [torch.ones(size, device=device) for _ in self.rule.element_slots(dtype)]
        shapes = {name: tuple(shape) for name, shape in self.coefficient_shapes.items()}
        if self.direction_law.lowrank is not None:
            given = [torch.ones(shape, device=device) for name, shape in shapes.items() if name != "g"]
            return self.update_along(w, slots, torch.ones(size, device=device), key, given, [one] * 3, one > 0, decay)
        scalars = [one] * len(self.scalar_names)
        seen = [torch.ones(size, device=device) for _ in self.read_names]
        coefficients = torch.zeros(points, device=device)
        if self.direction_law.needs_norm:
            self.squared_norm(w, key)
        if points:
            self.perturb(w, seen, key, one, scalars, coefficients, [w.clone() for _ in range(points)])
        if points and rows:
            ids = torch.zeros(1, dtype=torch.int64, device=device)
            pairs = [slot.view(1, size) for slot in seen]
            self.perturb_rows(w.view(1, size), pairs, ids, key, one, scalars, coefficients, points)
        named = [torch.ones(shape, device=device) for shape in shapes.values()]
        keys, scales = [key] * queries, [one] * queries
        self.update(w, slots, keys, scales, scalars, key, named, [one] * 3, one > 0, decay)

    # --- compilation ------------------------------------------------------------------------------------------

    def _run(self, name: tuple, kernel, arrays: list[Tensor], small: list[Tensor]) -> Sequence[Tensor]:
        """Call the kernel, compiled for every length of ``arrays``; ``small`` inputs have fixed shapes."""
        key = (*name, arrays[0].device)
        if key not in self._compiled:
            rows_kernel = arrays[0].ndim == 2
            sizes = {1: (64,) if rows_kernel else (_EXAMPLE,), 2: (64, 96)}  # equal sizes here become one symbol
            examples = [a.new_zeros(sizes[a.ndim]) for a in arrays]
            self._compiled[key] = compile_loop(kernel, [*examples, *small], range(len(arrays)))
        with torch.no_grad():
            return self._compiled[key](*arrays, *small)


def compile_loop(function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> Compiled:
    """An elementwise function as a loop: in C++ for a CPU, in Triton for a GPU."""
    if examples[0].is_cuda:
        from zowrap.ops.triton import loops

        return loops.compile_loop(function, examples, dynamic)
    return compile_function(function, examples, dynamic)


def alike(count: int) -> int:
    """The smallest number of elements that takes the same machine code on a GPU as ``count``.

    Triton has code of its own for multiples of 16, whose elements are read four or eight at a time, and for 1.
    """
    return 16 if count % 16 == 0 else min(count, 2)


_registry: dict[str, Kernels] = {}


def register(spec: str, kernels: Kernels) -> Kernels:
    """Kernels of that spec, shared by every program that names it."""
    return _registry.setdefault(spec, kernels)


def get(spec: str) -> Kernels:
    return _registry[spec]


def _segments(start: int, count: int) -> Iterator[tuple[int, int]]:
    """(first element, size) of the runs that make up ``count`` elements from ``start``, cut at multiples of SEGMENT."""
    end = start + count
    while start < end:
        size = min(end, (start // SEGMENT + 1) * SEGMENT) - start
        yield start, size
        start += size


_offsets: dict[tuple[int, torch.device], Tensor] = {}


def offset(first: int, device: torch.device) -> Tensor:
    """int32 ``[2]``: low and high half of an element index, kept per device (chunk starts recur every step)."""
    key = (first, device)
    if key not in _offsets:
        low, high = first & 0xFFFFFFFF, first >> 32
        _offsets[key] = torch.tensor([low - (1 << 32) if low >> 31 else low, high], dtype=torch.int32, device=device)
    return _offsets[key]
