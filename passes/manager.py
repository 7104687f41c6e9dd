"""Run passes in order, verify the program after each, and name the pass that broke it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from zowrap.compiler.program import Program, verify
from zowrap.errors import ZOError, ZOInternalError


class Pass:
    """One rewrite of a program. ``inspect`` and errors refer to it by ``name``.

    ``requires`` and ``ensures`` raise :class:`ZOInternalError` if the program does not have the properties that the
    pass needs or promises. ``call`` rewrites ``program`` in place and returns a short summary of its changes.
    """

    name = "pass"

    def requires(self, program: Program) -> None:
        """Check the program before ``call``."""

    def call(self, program: Program) -> str:
        raise NotImplementedError(f"{type(self).__name__}.call")

    def ensures(self, program: Program) -> None:
        """Check the program after ``call``, in addition to the invariants of every program."""


def run(program: Program, passes: Sequence[Pass]) -> Program:
    """Apply ``passes`` in order.

    Raises:
        ZOError: a pass cannot handle the model, or what was asked of it; the message says why.
        ZOInternalError: a pass broke an invariant; the message names this pass and those that ran before it.
    """
    done: list[str] = []
    for step in passes:
        start = time.perf_counter()
        try:
            step.requires(program)
            note = step.call(program)
            program.finish(step.name)
            verify(program)
            step.ensures(program)
        except ZOError:
            raise
        except Exception as error:
            before = f"after {', '.join(done)}" if done else "as the first pass"
            raise ZOInternalError(f"pass {step.name} ({before}) broke the program: {error}") from error
        program.notes[step.name] = f"{note} ({(time.perf_counter() - start) * 1e3:.0f} ms)"
        done.append(step.name)
    return program
