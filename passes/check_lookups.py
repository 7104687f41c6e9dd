"""Make look-ups on a CPU report an index out of range instead of ending the process.

    before                                  after
    e = embedding(w, ids, 0)                e = zowrap.rows(w, ids)
    x = index(table, [ids])                 x = index(table, [ids + zowrap.index_error(ids, 50, True, None)])
    s = cross_entropy_loss(logits, labels)  s = cross_entropy_loss(logits, labels + zowrap.index_error(labels, …))

Compiled CPU code checks an index with an assertion that terminates the process, so one wrong token id or label would
lose the run. ``zowrap.rows`` and ``zowrap.index_error`` raise an ``IndexError`` before anything is written.
``zowrap.index_error`` returns a 0 that is added to the index, so gathers and losses still fuse into their neighbours.

On a GPU, as in plain torch, the look-up's kernel asserts and the process can no longer use CUDA: checking first would
make every step wait for the device. Everything the run has saved by then is intact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import zowrap.ops.all  # noqa: F401 (registers torch.ops.zowrap)
from zowrap.compiler.inductor import symbolic_sizes
from zowrap.compiler.program import Program
from zowrap.errors import ZOInternalError
from zowrap.loss.module import IGNORED
from zowrap.passes.graph import reached
from zowrap.passes.manager import Pass

aten = torch.ops.aten
_PICKS = {aten.gather.default, aten.index_select.default}
_LOSSES = {
    aten.cross_entropy_loss.default,
    aten.nll_loss_nd.default,
    aten.nll_loss.default,
    aten.nll_loss2d.default,
    aten.nll_loss_forward.default,
    aten.nll_loss2d_forward.default,
}


class CheckLookups(Pass):
    """Check the index of every look-up; see the module docstring."""

    name = "check_lookups"

    def call(self, program: Program) -> str:
        lookups = program.graph.find_nodes(op="call_function", target=aten.embedding.default)
        for node in lookups:
            node.target, node.args, node.kwargs = torch.ops.zowrap.rows.default, node.args[:2], {}
        checks = _Checks(program)
        for node in list(program.graph.nodes):
            checks.put(node)
        return f"{len(lookups)} embeddings, {len(checks.made)} other indices"

    def ensures(self, program: Program) -> None:
        if program.graph.find_nodes(op="call_function", target=aten.embedding.default):
            raise ZOInternalError("an unchecked embedding is left")


class _Checks:
    """Puts a check before each look-up. Look-ups with the same index and the same number of entries share one check."""

    def __init__(self, program: Program) -> None:
        self.graph, self.fake_mode = program.graph, program.fake_mode
        self.made: dict[tuple[Any, ...], fx.Node] = {}
        self.read = reached(program.graph, set(program.graph.find_nodes(op="placeholder")))

    def put(self, node: fx.Node) -> None:
        args: list[Any] = list(node.args)
        if node.target is aten.index.Tensor:
            if all(i is None or _is_integer(i) for i in args[1]):  # a mask may span several dimensions
                args[1] = [i and self._checked(node, i, args[0], d, wraps=True) for d, i in enumerate(args[1])]
        elif node.target in _PICKS:
            args[2] = self._checked(node, args[2], args[0], args[1])
        elif node.target in _LOSSES and _is_integer(args[1]):  # otherwise the targets are probabilities
            ignored: Any = args[4] if len(args) > 4 else node.kwargs.get("ignore_index", IGNORED)
            args[1] = self._checked(node, args[1], args[0], 1 if args[0].meta["val"].ndim > 1 else 0, ignored=ignored)
        node.args = tuple(args)

    def _checked(
        self, node: fx.Node, index: fx.Node, table: fx.Node, dim: int, wraps: bool = False, ignored: int | None = None
    ) -> fx.Node:
        """Return ``index`` with its check added, for ``node`` to use along ``dim`` of ``table``."""
        value, entries = index.meta["val"], table.meta["val"]
        if value.device.type != "cpu" or not entries.ndim:
            return index
        size = entries.shape[dim]
        if index not in self.read and not isinstance(size, int):
            return index  # positions in the batch, computed from its sizes alone
        key = (index, str(size), wraps, ignored)
        if key not in self.made:
            source = index
            while source.target is aten.expand.default:  # repeats the same numbers
                source = source.args[0]  # type: ignore[assignment]
            with self.graph.inserting_before(node):
                count: Any = size
                if not isinstance(size, int):
                    count = self.graph.call_function(aten.sym_size.int, (table, dim))
                    count.meta["val"] = size
                zero = self.graph.call_function(torch.ops.zowrap.index_error.default, (source, count, wraps, ignored))
                with symbolic_sizes(self.fake_mode):
                    zero.meta["val"] = value.new_zeros(())
                self.made[key] = self.graph.call_function(aten.add.Tensor, (index, zero))
                with symbolic_sizes(self.fake_mode):  # where the index is no block of memory, the sum is one
                    self.made[key].meta["val"] = value + zero.meta["val"]
        return self.made[key]


def _is_integer(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.int64, torch.int32)
