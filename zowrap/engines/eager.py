"""The eager engine: the oracle. Plain torch, one tensor at a time, simple enough to trust by reading.

It materialises a perturbed copy of the tunable parameters for each evaluation (the weights themselves are only
written by :meth:`EagerEngine.update`), so it needs one more copy of what moves and is slower; it runs any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zowrap import machine
from zowrap.errors import Option, ZOCaptureError, ZOError
from zowrap.loss.evaluation_mode import evaluation_mode, forbid_writes, keep_buffers
from zowrap.loss.module import Batch, count_rows, select_example
from zowrap.numerics import codes, noise
from zowrap.numerics.dtypes import at_least_float32, is_16_bit
from zowrap.rules.base import Scalars
from zowrap.step import lowrank
from zowrap.step.arithmetic import Conclusion, evaluated_direction, perturb_weight, update_leaf
from zowrap.step.credit import SKETCHES, Credit, Piece, gradient
from zowrap.step.directions import integer_squares, squared_norm
from zowrap.step.job import DirectionNoise, Job, Signs
from zowrap.step.parameters import Parameter
from zowrap.telling import Telling

if TYPE_CHECKING:
    from zowrap.compiler.program import Program
    from zowrap.engines.captures import Captures


class EagerEngine:
    """See the module."""

    name = "eager"

    def __init__(self, job: Job, captures: Captures | None = None) -> None:
        self.job = job
        self._captures = captures  # shared with the engine that this one stands behind, if there is one
        self._programs: dict[int, Program] = {}  # with residual credit, by the captured program they were made of
        self._places = [_places(job.loss.model, p.names) for p in job.parameters]

    def active(self, block: int) -> list[tuple[int, Parameter]]:
        """(index, parameter) of the block's parameters."""
        return [(i, self.job.parameters[i]) for i in self.job.blocks[block].indices]

    def direction(self, query: DirectionNoise, index: int, which: int = 0) -> Tensor:
        """z of parameter ``index``: float32, the parameter's shape; ``which`` of the query's directions."""
        job, w = self.job, self.job.parameters[index].tensor
        if query.factors is not None:
            place = job.layouts[query.block].places[index]
            right = place.right_of(query.factors)
            left = place.left_of(query.factors)[which]
            return lowrank.product(left, None if right is None else right[which], w.shape)
        u = noise.draw(job.direction.law, query.keys[index], w.shape)
        if job.direction.needs_norm:
            u = u * query.scale
        return job.rule.direction(u, at_least_float32(w), job.direction_slots_of(index), query.scalars)

    # --- evaluations ------------------------------------------------------------------------------------------

    def one_batch(self) -> AbstractContextManager[None]:
        return nullcontext()  # every point by itself: nothing is shared, and nothing can be shared wrongly

    @torch.no_grad()
    def losses(self, batch: Batch, query: DirectionNoise | None, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        with evaluation_mode(self.job.loss):
            if query is None:
                sums, weights = self.job.loss(batch)
                return sums.unsqueeze(0), weights
            if not query.per_example:
                return self._along(batch, query, coefficients, 0)
            examples = [select_example(batch, b) for b in range(count_rows(batch))]
            pairs = [self._along(one, query, coefficients, b) for b, one in enumerate(examples)]
            return torch.cat([sums for sums, _ in pairs], dim=1), torch.cat([weights for _, weights in pairs])

    def _along(self, batch: Batch, query: DirectionNoise, coefficients: Tensor, which: int) -> tuple[Tensor, Tensor]:
        rows = []
        kept = machine.rng_states(self.job.device)
        weights = torch.zeros(())
        for coefficient in coefficients:
            # A model that draws random numbers draws the same ones at every point.
            machine.restore_rng(self.job.device, kept)
            copies = {}
            for i, p in self.active(query.block):
                if p.codes:  # the layer adds what the weights of its codes are moved by
                    copy = coefficient * self.direction(query, i, which)
                    copies.update({f"model.{name.removesuffix('weight')}delta": copy for name in self._places[i]})
                    continue
                copy = perturb_weight(p.tensor, self.direction(query, i, which), coefficient)
                copies.update({f"model.{name}": copy for name in self._places[i]})
            # Every point starts from the same buffers. Perturbed copies are not written to either, or a model would
            # pass or fail by what is perturbed.
            with keep_buffers(self.job.loss), forbid_writes(copies.items()):
                sums, weights = torch.func.functional_call(self.job.loss, copies, (batch,), tie_weights=False)
            rows.append(sums)
        return torch.stack(rows), weights

    def derivative(self, batch: Batch, query: DirectionNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Loss sums at θ, their exact derivatives along z, and weights, by forward-mode differentiation: ``[rows]``.

        Raises:
            ZOError: torch has no forward-mode derivative for an operation of the model.
        """
        active = self.active(query.block)
        point = {i: p.tensor.detach() for i, p in active}
        tangents = {i: self.direction(query, i).to(p.tensor.dtype) for i, p in active}

        def loss(values: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
            copies = {f"model.{name}": values[i] for i, _ in active for name in self._places[i]}
            return torch.func.functional_call(self.job.loss, copies, (batch,), tie_weights=False)

        # Fused attention has no forward-mode derivative; the plain formula does.
        with torch.no_grad(), evaluation_mode(self.job.loss), sdpa_kernel(SDPBackend.MATH):
            try:
                found = torch.func.jvp(loss, (point,), (tangents,), has_aux=True)
            except NotImplementedError as error:
                raise ZOError(
                    "this model has no exact forward gradient: use ", Option("estimator", "central"), f" ({error})"
                ) from error
        sums, slopes, weights = cast("tuple[Tensor, ...]", found)
        return sums, slopes, weights

    @torch.no_grad()
    def factors(self, block: int, keys: Tensor, right_keys: Tensor) -> Tensor:
        layout, table = self.job.layouts[block], noise.gaussian_table(keys.device)
        out = torch.empty(keys.shape[0], layout.size, device=keys.device)
        lowrank.draw(out, layout.owner, layout.start, layout.scale, keys, right_keys, table)
        return out

    @torch.no_grad()
    def squared_norm(self, block: int, keys: Tensor) -> Tensor:
        law = self.job.direction.law
        total = torch.zeros((), dtype=torch.int64, device=keys.device)
        for i, parameter in self.active(block):
            total += integer_squares(noise.draw(law, keys[i], parameter.tensor.shape)).sum()
        return squared_norm(total)

    # --- the update -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, queries: Sequence[DirectionNoise], rounding_keys: Tensor, conclusion: Conclusion) -> None:
        job, block = self.job, queries[0].block
        for i, _ in self.active(block):
            directions, coefficients = self._update_directions(queries, i, conclusion)
            self._write(i, directions, coefficients, rounding_keys, conclusion)
        for name, value in conclusion.state.items():
            job.states[block][name].copy_(value)

    def _write(
        self,
        index: int,
        directions: Sequence[Tensor],
        coefficients: Scalars,
        rounding_keys: Tensor,
        conclusion: Conclusion,
    ) -> None:
        """Write the update of one parameter along some directions, ĝ = Σ coefficients["g"][i] · directions[i]."""
        job, parameter = self.job, self.job.parameters[index]
        w = old = parameter.tensor
        slots = job.slots_of(index)
        bits = None
        if parameter.scale is not None and parameter.codes:
            unit = codes.unit_of(parameter.scale)
            w = old = codes.dequantize(parameter.tensor, unit)
        if parameter.codes or is_16_bit(w):
            place = torch.arange(w.numel(), dtype=torch.int64, device=w.device)
            bits = noise.hash_bits(*noise.split_index(place), rounding_keys[index]).reshape(w.shape)
        new_w, new_slots = update_leaf(
            job.rule,
            w,
            directions,
            slots,
            coefficients,
            job.hyper,
            conclusion.apply,
            None if parameter.codes else bits,
            job.decays and parameter.decays,
        )
        if parameter.codes and bits is not None:
            new_w = codes.add_change(parameter.tensor, new_w - old, unit, bits, conclusion.apply)
        parameter.tensor.copy_(new_w)
        for name, value in new_slots.items():
            slots[name].copy_(value)

    def _update_directions(
        self, queries: Sequence[DirectionNoise], index: int, conclusion: Conclusion
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The directions that a parameter's update goes along, and the rule's coefficients for them."""
        job, c = self.job, conclusion.coefficients
        if queries[0].factors is None:
            w, eps = job.parameters[index].tensor, job.hyper["eps"]
            return [evaluated_direction(w, self.direction(query, index), eps, job.second_point) for query in queries], c
        layout = job.layouts[queries[0].block]
        factor = layout.law.update
        slot = job.left_of(index)
        if slot is not None:
            new = realign_slot(job, queries, index, slot, conclusion)
            right = layout.places[index].right_of(queries[0].factors)
            z = lowrank.product(new, None if right is None else right[0], job.parameters[index].tensor.shape)
            return [factor * z], {**c, "g": torch.ones_like(c["g"][:1])}
        total, g = torch.zeros_like(job.parameters[index].tensor, dtype=torch.float32), iter(c["g"])
        for query in queries:
            assert query.factors is not None
            for which in range(query.factors.shape[0]):  # one at a time: a population has as many as examples
                total += next(g) * factor * self.direction(query, index, which)
        return [total], {**c, "g": torch.ones_like(c["g"][:1])}

    # --- residual credit --------------------------------------------------------------------------------------

    @torch.no_grad()
    def credit(self, batch: Batch, signs: Signs, keep_inputs: bool) -> tuple[Tensor, Tensor, list[Piece]]:
        """Run the captured program, node by node: it is the flow of data through it that gives credit."""
        from zowrap.passes.residual import collect_pieces, sketch_inputs  # capture is imported only where it is used

        captures, program = self._captured_programs(), self._credit_program(batch)
        sketch = signs(sketch_inputs(program))
        sums, weights, *rest = program(captures.arguments(program, batch, lambda target: sketch))
        return sums.unsqueeze(0), weights, collect_pieces(program.credit, rest, with_inputs=True)

    def visit_credit(self, credit: Credit, visit: Callable[[int, list[Piece]], None]) -> None:
        for batch, pieces in credit.pending:  # of an engine that has fallen back in the middle of a step
            _, _, whole = self.credit(batch, lambda inputs: torch.zeros(inputs, SKETCHES, device=self.job.device), True)
            for piece, other in zip(pieces, whole, strict=True):
                piece.x = other.x
        credit.pending = []
        for i in credit.parameters:
            visit(i, credit.of(i))

    def credited(self, batch: Batch) -> set[int]:
        """Indices of the parameters that get residual credit from this kind of batch."""
        return {use.parameter for use in self._credit_program(batch).credit}

    def _credit_program(self, batch: Batch) -> Program:
        from zowrap.passes.build import build_credit

        try:
            captured = self._captured_programs().find(batch)
        except ZOCaptureError as error:
            raise ZOError(
                "residual credit follows the flow of data through a captured program, and this model cannot be "
                f"captured: {error}; what runs any model is ",
                Option("estimator", "central"),
            ) from error
        if id(captured) not in self._programs:
            self._programs[id(captured)] = build_credit(captured.clone(), self.job)
        return self._programs[id(captured)]

    def _captured_programs(self) -> Captures:
        if self._captures is None:
            from zowrap.engines.captures import Captures

            self._captures = Captures(self.job.loss, Telling(lambda: 0.0, "", silent=True))
        return self._captures

    @torch.no_grad()
    def update_with(self, credit: Credit, rounding_keys: Tensor, factor: Tensor, conclusion: Conclusion) -> None:
        self.visit_credit(credit, lambda i, pieces: self.write_credit(i, pieces, factor, rounding_keys, conclusion))
        for name, value in conclusion.state.items():
            self.job.states[0][name].copy_(value)

    @torch.no_grad()
    def write_credit(
        self, index: int, pieces: list[Piece], factor: Tensor, rounding_keys: Tensor, conclusion: Conclusion
    ) -> None:
        """Write the update of one parameter along ``factor`` times its credit."""
        g = gradient(pieces, factor, self.job.parameters[index].tensor.shape)
        one = {**conclusion.coefficients, "g": torch.ones_like(conclusion.coefficients["g"])}
        self._write(index, [g], one, rounding_keys, conclusion)

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "program_hash": None, "compile_count": 0}


def _places(model: nn.Module, names: Sequence[str]) -> list[str]:
    """One of ``names`` for each place that holds the parameter: a module and an attribute.

    A module registered twice is one place under two names. ``functional_call`` given both, or finding both itself
    (``tie_weights``), saves what it put there under the first as the original of the second, and leaves it there.
    """
    places: dict[tuple[int, str], str] = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        places.setdefault((id(model.get_submodule(module)), attribute), name)
    return list(places.values())


def realign_slot(
    job: Job, queries: Sequence[DirectionNoise], index: int, slot: Tensor, conclusion: Conclusion
) -> Tensor:
    """Write the rule's ``"left"`` state of one parameter and return it; a few numbers, the same for both engines."""
    first = queries[0]
    assert first.old_factors is not None and first.moved is not None
    buffer = torch.cat([s.factors for s in queries if s.factors is not None])
    layout = job.layouts[first.block]
    new = lowrank.realign_left(
        job.rule, layout, index, slot, buffer, first.old_factors, first.moved, conclusion.coefficients
    )
    slot.copy_(torch.where(conclusion.apply, new, slot))
    return new
