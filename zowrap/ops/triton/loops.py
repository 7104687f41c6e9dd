"""Compile a traced elementwise function to one Triton kernel over all elements, for any length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zowrap.compiler.inductor import Compiled, trace
from zowrap.errors import ZOCaptureError, ZOInternalError
from zowrap.ops.triton import sources
from zowrap.ops.triton.emit import Body, Small, emit

# Elements and warps of one program: enough independent work to hide the latency of memory, few enough registers for
# rules with three slots.
BLOCK, WARPS = 1024, 4


def compile_loop(function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> Compiled:
    """Compile a function as :func:`zowrap.compiler.inductor.compile_function` does, but for a GPU.

    Args:
        function: writes into its inputs elementwise, returns new tensors of the elements' shape, or returns int64 sums
            over all elements.
        examples: example inputs; those listed in ``dynamic`` are contiguous arrays: ``[n]``, or ``[rows, columns]``
            together with ``[rows]`` and ``[columns]``.

    Raises:
        ZOCaptureError: an operation of the function has no counterpart on a GPU, or Triton is not installed.
    """
    start = time.perf_counter()
    loop = _Loop(function, examples, dynamic)
    return Compiled(loop, time.perf_counter() - start, cached=False)


class _Loop:
    """A compiled loop, called with the function's inputs in order; see :func:`compile_loop`."""

    def __init__(self, function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int]) -> None:
        graph_module, fakes = trace(function, examples, dynamic)
        self.main = max(dynamic, key=lambda i: fakes[i].ndim)
        self.axes = [str(size) for size in fakes[self.main].shape]
        self.arrays = set(dynamic)
        # Elements of arrays are loaded at the start of the kernel, numbers of small inputs where they are used.
        inputs = [f"x{i}" if i in self.arrays else Small(f"p{i}") for i in range(len(fakes))]
        body = emit(graph_module, inputs, self._size)
        returned = graph_module.graph.output_node().args[0]
        self.dtypes = [node.meta["val"].dtype for node in returned]  # type: ignore[union-attr]
        self.sums = body.sums
        self.source = self._source(graph_module, fakes, body)
        self.kernel = sources.kernel(self.source)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        import triton

        main = inputs[self.main]
        columns = main.shape[1] if main.ndim == 2 else 1
        if any(not inputs[i].is_contiguous() for i in self.arrays):
            raise ZOInternalError("the arrays of a kernel must be contiguous")
        outputs = [
            main.new_zeros((), dtype=dtype) if is_sum else torch.empty_like(main, dtype=dtype)
            for dtype, is_sum in zip(self.dtypes, self.sums, strict=True)
        ]
        if count := main.numel():
            with torch.cuda.device_of(main):
                grid = (triton.cdiv(count, BLOCK),)
                # Fusing a product with a sum would round only once, but a CPU rounds twice.
                given = [*inputs, *outputs, count, columns]
                sources.launch(self.kernel, grid, *given, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)
        return outputs

    def _address(self, fake: Tensor) -> str:
        axes = [str(size) for size in fake.shape]
        if axes == self.axes:
            return "i"
        return "row" if axes == self.axes[:1] else "column"

    def _size(self, name: str) -> str:
        """Return the expression of a size or an index, as ``sizes`` of :func:`zowrap.ops.triton.emit.emit`."""
        indices = ["i"] if len(self.axes) == 1 else ["row", "column"]
        extents = ["count"] if len(self.axes) == 1 else ["count // columns", "columns"]
        if name.removeprefix("index ") not in self.axes:
            raise ZOCaptureError(f"a kernel on a GPU can use only the sizes of its arrays, not {name}")
        if name.startswith("index "):
            return indices[self.axes.index(name.removeprefix("index "))]
        return extents[self.axes.index(name)]

    def _source(self, graph_module: Any, fakes: Sequence[Tensor], body: Body) -> str:
        pointers = [f"p{i}" for i in range(len(fakes))] + [f"o{i}" for i in range(len(body.outputs))]
        lines = ["i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)", "inside = i < count"]
        if len(self.axes) == 2:
            lines += ["row = i // columns", "column = i - row * columns"]
        read = {node for node in graph_module.graph.find_nodes(op="placeholder") if _is_read(node)}
        for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
            if i in self.arrays and node in read:
                lines.append(f"x{i} = tl.load(p{i} + {self._address(fakes[i])}, mask=inside, other=0)")
        lines += body.once + body.lines
        lines += [f"tl.store(p{i} + {self._address(fakes[i])}, {text}, mask=inside)" for i, text in body.stores]
        for i, (text, is_sum) in enumerate(zip(body.outputs, body.sums, strict=True)):
            if is_sum:
                lines.append(f"tl.atomic_add(o{i}, tl.sum(tl.where(inside, {text}, 0), axis=0))")
            else:
                lines.append(f"tl.store(o{i} + i, {text}, mask=inside)")
        arguments = ", ".join([*pointers, "count", "columns", "BLOCK: tl.constexpr"])
        # Triton compiles a separate kernel for each alignment of an argument. For inputs read as single numbers this
        # gains nothing, and the alignment of a key depends on the parameter's number, so they are not specialised. For
        # arrays, their count and columns it yields wide loads and fewer divisions, so these are specialised, and
        # :meth:`zowrap.ops.kernels.Kernels.warm` compiles every case.
        loose = [f"p{i}" for i in range(len(fakes)) if i not in self.arrays or self._address(fakes[i]) != "i"]
        head = f"@triton.jit(do_not_specialize={loose})\ndef kernel({arguments}):\n"
        return head + "".join(f"    {line}\n" for line in lines)


def _is_read(node: Any) -> bool:
    """Return whether an array's elements are read; some arrays are only written, or only their size is used."""
    aten = torch.ops.aten
    return any(
        user.target is not aten.sym_size.int and not (user.target is aten.copy_.default and user.args[0] is node)
        for user in node.users
    )
