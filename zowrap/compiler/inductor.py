"""Compile fx graphs to machine code, in a thin layer over torch's Inductor.

Dynamo is not involved, so there are no guards and nothing recompiles unnoticed: a graph with symbolic sizes becomes one
callable for every size, including 0 and 1 (``backed_size_oblivious``), and :data:`compile_count` counts it. Compiled
code is kept between processes (:mod:`zowrap.compiler.cache`).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, standalone_compile
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from zowrap.compiler import cache
from zowrap.errors import ZOCaptureError, first_line


class RefusedProgram(ZOCaptureError):
    """The compiler cannot express a program; it may well take one that leaves fewer sizes open."""


compile_count = 0  # graphs and kernels that this process compiled or loaded from the cache
cache.use_cache_folder()
_run_compiler = cpp_builder.run_compile_cmd
_C_DRIVER = re.compile(r"(.*-)?(gcc|cc|clang)(-[\d.]+)?")


def _compile_beside(cmd_line: str, cwd: str) -> None:
    """Run torch's command of the C++ compiler, and put the file in its place only once it is whole.

    torch takes every file that exists for a whole one. A process killed while the compiler writes would leave part of
    one in the cache, and every later start of the job would load that.

    A C driver (gcc for g++) compiles C++ too, but does not link its library, which is therefore named here. peft leaves
    CXX=gcc behind where its BOFT finds no CUDA.
    """
    words = shlex.split(cmd_line)
    if "-o" not in words:  # Microsoft's compiler
        return _run_compiler(cmd_line, cwd)
    at = words.index("-o") + 1
    target, words[at] = words[at], f"{words[at]}.{os.getpid()}.part"
    if "-shared" in words and _C_DRIVER.fullmatch(os.path.basename(words[0])) and sys.platform == "linux":
        words.append("-lstdc++")
    _run_compiler(shlex.join(words), cwd)
    os.replace(words[at], target)


cpp_builder.run_compile_cmd = _compile_beside


@dataclass
class Compiled:
    """A compiled graph. Call it with the graph's inputs in order; it returns a sequence of tensors.

    Attributes:
        seconds: the time that compiling took.
        cached: whether the machine code came from an earlier process.
    """

    call: Callable[..., Sequence[Any]]
    seconds: float
    cached: bool

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        return self.call(*inputs)


def size_oblivious(**options: Any) -> Any:
    """Enter a context in which symbolic sizes may be 0 or 1 at run time."""
    patch: Any = symbolic_config.patch  # type: ignore[attr-defined]  # installed at import, unknown to checkers
    return patch(backed_size_oblivious=True, **options)


@contextmanager
def symbolic_sizes(mode: FakeTensorMode) -> Iterator[None]:
    """Enter a context in which operations compute with the fake tensors of ``mode``, whose sizes may be symbols."""
    # Without Python's dispatcher some operators (padding by a symbolic amount) reach kernels that want numbers.
    with torch.no_grad(), size_oblivious(use_duck_shape=False), mode, enable_python_dispatcher():
        yield


def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
    """Compile a functional graph for all sizes.

    Args:
        graph_module: placeholders in the order of ``inputs``; output a tuple.
        inputs: fake tensors (symbolic where sizes vary).

    Raises:
        ZOCaptureError: compiling failed; the message says what is missing, if that is known.
    """
    global compile_count
    start, misses = time.perf_counter(), _misses()
    try:
        mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
        context = torch._guards.TracingContext(mode)  # keeps the ranges that capture found for symbols
        with torch.no_grad(), size_oblivious(use_duck_shape=False), torch._guards.tracing(context):
            call = _compile(graph_module, inputs)
    except Exception as error:
        raise _explain_failure(error) from error
    compile_count += 1
    return Compiled(call, time.perf_counter() - start, cached=_misses() == misses)


def _compile(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile, once more where a library in the cache cannot be loaded."""
    try:
        return standalone_compile(graph_module, list(inputs), dynamic_shapes="from_tracing_context")
    except Exception as error:
        if not cache.remove_broken_library(str(error)):
            raise
    return standalone_compile(graph_module, list(inputs), dynamic_shapes="from_tracing_context")


def _misses() -> int:
    """The number of misses of torch's cache so far, including graphs that cannot be cached."""
    found = counters["aot_autograd"]
    return found["autograd_cache_miss"] + found["autograd_cache_bypass"]


def _add(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else x + alpha * y


def _sub(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else x - alpha * y


def _addcmul(x: Tensor, y: Tensor, z: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * (y * z)


def _addcdiv(x: Tensor, y: Tensor, z: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * (y / z)


def _lerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    return x + weight * (y - x) if abs(weight) < 0.5 else y - (1 - weight) * (y - x)


def _lerp_tensor(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < 0.5, x + weight * (y - x), y - (1 - weight) * (y - x))


def _pow(x: Tensor, exponent: Any) -> Any:
    if not x.is_floating_point() or not isinstance(exponent, (int, float)):
        return NotImplemented
    if exponent == 0.5:
        return x.sqrt()
    if exponent != exponent // 1 or abs(exponent) >= 32:  # torch's own limit for squaring
        return NotImplemented
    return _power(x.reciprocal() if exponent < 0 else x, int(abs(exponent)))


def _power(x: Tensor, exponent: int) -> Tensor:
    if exponent < 2:
        return x.clone() if exponent else torch.ones_like(x)
    half = _power(x, exponent // 2)
    return half * half * x if exponent % 2 else half * half


def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return torch.where(mask, torch.full_like(x, value), x)


aten = torch.ops.aten
# Operations that torch's compiler may or may not fuse into one instruction, depending on device and version. Split into
# steps that each round, as on a CPU, they give a rule the same bits everywhere.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp_tensor,
    aten.pow.Tensor_Scalar: _pow,
    aten.masked_fill.Scalar: _masked_fill,
}


def trace(
    function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int], fixed: Sequence[int] = ()
) -> tuple[fx.GraphModule, list]:
    """Trace ``function`` to an fx graph, and return it with its fake inputs.

    All sizes of the inputs whose numbers are in ``dynamic`` are symbolic, except the sizes in ``fixed``; equal sizes of
    the examples become one symbol. Operations that a compiler may fuse with different rounding are decomposed.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad(), size_oblivious():
        fakes = []
        for i, example in enumerate(examples):
            kinds = [
                DimDynamic.DUCK if i in dynamic and size not in fixed else DimDynamic.STATIC for size in example.shape
            ]
            context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
            source = ConstantSource(f"input{i}")
            example = torch.empty_like(example)  # otherwise the same tensor passed twice would become one input
            fakes.append(mode.from_tensor(example, symbolic_context=context, source=source))
        with mode:
            traced = make_fx(function, decomposition_table=_DECOMPOSITIONS)(*fakes)
    # An empty tuple would become an annotation that torch's compile cache cannot read, and nothing would be cached.
    traced.graph.output_node().type = None
    traced.recompile()
    return traced, fakes


def compile_function(
    function: Callable[..., Any], examples: Sequence[Tensor], dynamic: Sequence[int], fixed: Sequence[int] = ()
) -> Compiled:
    """Trace and compile ``function``, which may write into its inputs and returns a tuple. See :func:`trace`."""
    return compile_graph(*trace(function, examples, dynamic, fixed))


def _explain_failure(error: Exception) -> ZOCaptureError:
    name = type(error).__name__
    cause: BaseException | None = error
    text = ""
    while cause is not None:
        name, text = type(cause).__name__, f"{text} {cause}"
        cause = cause.__cause__
    if "InvalidCxxCompiler" in text + name or "No working C++ compiler" in text or isinstance(error, FileNotFoundError):
        return ZOCaptureError("no working C++ compiler was found (install g++, or set CXX to one)")
    if "CppCompileError" in text + name or isinstance(error, subprocess.CalledProcessError):
        return ZOCaptureError("the C++ compiler failed on generated code (set CXX to a recent g++ or clang)")
    first = first_line(error, name)
    return RefusedProgram(f"the compiler refused the captured program ({name}: {first[:200]})")
