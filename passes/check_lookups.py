"""Embeddings report an id out of range instead of ending the process, on a CPU.

    before                                  after
    e = embedding(w, ids, 0)                e = zowrap.rows(w, ids)

Compiled CPU code checks an index with an assertion that terminates the process; a user who feeds one wrong token id
would lose the run. ``zowrap.rows`` raises an ``IndexError`` before anything is written.

On a GPU the kernel of the look-up asserts and CUDA serves the process no more, as under plain torch: to look first
would make every step wait for the device. What a run has saved by then is whole.
"""

from __future__ import annotations

import torch
from zowrap.passes.manager import Pass

from zowrap import operators  # noqa: F401  (registers torch.ops.zowrap)
from zowrap.errors import ZOInternalError
from zowrap.program import Program


class CheckLookups(Pass):
    """See the module."""

    name = "check_lookups"

    def call(self, program: Program) -> str:
        lookups = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
        for node in lookups:
            node.target, node.args, node.kwargs = torch.ops.zowrap.rows.default, node.args[:2], {}
        return f"{len(lookups)} embeddings"

    def ensures(self, program: Program) -> None:
        if program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
            raise ZOInternalError("an unchecked embedding is left")
