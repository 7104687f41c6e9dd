"""The captured programs of a run: one for each kind of batch, or several where sizes or values decide.

Both engines find their programs here: the compiled one for everything, the eager one for residual credit, which follows
the flow of data through a program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from zowrap.compiler.capture import FREEDOMS, ROWS_ALONE, batch_signature, canonical_batch, capture
from zowrap.compiler.program import Program
from zowrap.errors import ZOCaptureError
from zowrap.loss.module import Batch, LossModule
from zowrap.telling import Telling

MAX_FIXED_SIZES = 8  # programs per kind of batch where export cannot make a size dynamic; each costs a compilation
# Of a program for one size: a model that loops over positions is as many times as long, and compiles for minutes.
MAX_OWN_NODES = 10_000
MAX_KINDS = 16  # kinds of batch; more come only where a value that is no tensor changes from step to step


class Captures:
    """See the module.

    Attributes:
        by_kind: the programs of each kind of batch.
        refused: the last batch that could not be captured, and why.
        seconds: spent on capturing.
    """

    def __init__(self, loss: LossModule, telling: Telling) -> None:
        self.loss, self.telling = loss, telling
        self.by_kind: dict[tuple, list[Program]] = {}
        self.refused: tuple[Batch, ZOCaptureError] | None = None
        self.seconds = 0.0
        self._restricted: list[Program] = []  # kept, because executables are found by the identity of their program
        self._first_freedom: dict[tuple, int] = {}  # by kind of batch: the first of FREEDOMS that the compiler may take
        self._inside = False
        self._tensors: dict[str, Tensor] | None = None

    @property
    def read_values(self) -> bool:
        """Whether values of a batch decide which program it needs."""
        return any(program.guards.read_values for programs in self.by_kind.values() for program in programs)

    def find(self, batch: Batch) -> Program:
        """The captured loss for this kind of batch; captured on first need.

        Raises:
            ZOCaptureError: the model cannot be captured.
        """
        kind = batch_signature(batch)
        if kind not in self.by_kind and len(self.by_kind) == MAX_KINDS:
            raise ZOCaptureError(_too_many(list(self.by_kind)))
        programs = self.by_kind.setdefault(kind, [])
        for program in programs:
            if program.accepts(batch):
                return program
        if self.refused is not None and self.refused[0] is batch:  # who asks twice does not wait twice
            raise self.refused[1]
        start = time.perf_counter()
        try:
            with self.telling.during("capturing the step"):
                return self._capture(batch, programs)
        except ZOCaptureError as error:
            self.refused = batch, error
            raise
        finally:
            self.seconds += time.perf_counter() - start

    def _capture(self, batch: Batch, programs: list[Program]) -> Program:
        """Capture one more program for this kind of batch."""
        if len(programs) == MAX_FIXED_SIZES:
            raise ZOCaptureError(
                f"what this model does depends on the sizes of its inputs, and {MAX_FIXED_SIZES} sizes were captured "
                f"already (pad every batch to one size)"
            )
        loss, first = self.loss, self._first_freedom.get(batch_signature(batch), 0)
        if first:  # the compiler has refused a program that leaves more sizes open
            example = batch if first > ROWS_ALONE else canonical_batch(batch, loss.model, lengths=False)
            programs.append(capture(loss, example, first, len(FREEDOMS) - 1))
            if programs[-1].accepts(batch):
                return programs[-1]
            programs.pop()
        elif all(each.guards.read_values for each in programs):  # another way may leave as many sizes open
            programs.append(capture(loss, canonical_batch(batch, loss.model)))
            if programs[-1].accepts(batch):
                return programs[-1]
            programs.pop()  # the canonical sizes got fixed, or the model does something else at the batch's own
        own = capture(loss, batch, first, len(FREEDOMS) - 1)
        count = len(own.graph.nodes)
        if count > MAX_OWN_NODES:
            raise ZOCaptureError(
                f"what this model does depends on the sizes of its inputs, and a program for this size alone would "
                f"have {count:,} operations"
            )
        own.guards.accept(batch)
        if not own.accepts(batch):
            raise ZOCaptureError("this model branches on other values when it runs again")
        programs.append(own)
        return own

    def restrict(self, batch: Batch, refused: Program) -> bool:
        """Leave fewer sizes of this kind of batch open, where the compiler has refused a program of more.

        Convolutions with strides make sizes that it cannot express, and images mostly have one size.

        Returns:
            Whether there is anything left to fix; the next :meth:`find` does so.
        """
        first = ROWS_ALONE if refused.freedom < ROWS_ALONE else len(FREEDOMS) - 1
        if refused.freedom >= first or not refused.varies:
            return False
        kind = batch_signature(batch)
        self._first_freedom[kind] = first
        self._restricted.append(refused)
        self.by_kind[kind] = [program for program in self.by_kind[kind] if program is not refused]
        return True

    def arguments(self, program: Program, batch: Batch, added: Callable[[str], Tensor]) -> list[Any]:
        """The inputs of a program, in order.

        Args:
            added: gives the inputs that passes added, by their target.
        """
        named = self._named_tensors()
        values: list[Any] = []
        for given in program.inputs:
            if given.kind == "batch":
                value = batch[given.target]
                values.append(value.contiguous() if isinstance(value, Tensor) else value)  # as it was compiled for
            elif given.kind == "added":
                values.append(added(given.target))
            else:
                values.append(named[given.target] if given.target in named else program.constants[given.target])
        return values

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Inside, the model's tensors are looked up once."""
        self._inside = True
        try:
            yield
        finally:
            self._inside, self._tensors = False, None

    def _named_tensors(self) -> dict[str, Tensor]:
        """The model's tensors by name. They are looked up once a batch: between batches a user may exchange them."""
        if self._tensors is not None:
            return self._tensors
        named: dict[str, Tensor] = dict(self.loss.named_parameters(remove_duplicate=False))
        named.update(self.loss.named_buffers(remove_duplicate=False))
        if self._inside:
            self._tensors = named
        return named


def _too_many(kinds: list[tuple]) -> str:
    """Why batches of so many kinds cannot all be captured: the value that differs, if there is one."""
    constants = [{part[0]: part[1] for part in kind if len(part) == 2} for kind in kinds]
    for name in constants[-1]:
        if len({found.get(name) for found in constants}) > len(kinds) // 2:
            return (
                f"{name!r} differs from batch to batch and is not a tensor, so each of its values needs a program of "
                f"its own (give it as a tensor, or leave it out)"
            )
    return f"the batches are of more than {MAX_KINDS} kinds (names, dtypes and numbers of dimensions of what they hold)"
