"""Runs passes in order, verifies after each, and names the one that broke something."""

from __future__ import annotations

import time
from collections.abc import Sequence

from zowrap.compiler.program import Program, verify
from zowrap.errors import ZOCaptureError, ZOInternalError


class Pass:
    """One rewrite. ``name`` is how ``inspect`` and errors call it.

    ``requires`` and ``ensures`` raise :class:`ZOInternalError` when the program is not what the pass needs or promises;
    ``call`` rewrites ``program`` in place and returns a sentence about what it did.
    """

    name = "pass"

    def requires(self, program: Program) -> None:
        """Checked before ``call``."""

    def call(self, program: Program) -> str:
        raise NotImplementedError(f"{type(self).__name__}.call")

    def ensures(self, program: Program) -> None:
        """Checked after ``call``, beside the invariants of every program."""


def run(program: Program, passes: Sequence[Pass]) -> Program:
    """Apply ``passes`` in order.

    Raises:
        ZOCaptureError: a pass cannot handle the model; the message names the pass.
        ZOInternalError: a pass broke an invariant; the message names it and those that ran before it.
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
        except ZOCaptureError:
            raise
        except Exception as error:
            before = f"after {', '.join(done)}" if done else "as the first pass"
            raise ZOInternalError(f"pass {step.name} ({before}) broke the program: {error}") from error
        program.notes[step.name] = f"{note} ({(time.perf_counter() - start) * 1e3:.0f} ms)"
        done.append(step.name)
    return program
