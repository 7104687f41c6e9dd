"""Capture a model and its loss as a program, with ``torch.export``.

The example batch for export always has fixed canonical sizes, not those of the first batch: compilers take hints from
it, and a resumed run must compile the same code. A model that behaves differently at other sizes is captured there with
the batch that comes up; a run that is resumed between such batches may then compile slightly different code, with
different last bits of the loss.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.export._trace as trace
from torch import Tensor, fx
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_symbols

from zowrap.compiler.branches import BatchNumbers, Branches
from zowrap.compiler.conversions import capture_conversions
from zowrap.compiler.experts import capture_experts
from zowrap.compiler.guards import Guards, accept_single_rows, ask_before_squeezing
from zowrap.compiler.inductor import size_oblivious
from zowrap.compiler.lengths import capture_lengths
from zowrap.compiler.masks import capture_masks
from zowrap.compiler.pictures import capture_pictures
from zowrap.compiler.program import Input, Program
from zowrap.compiler.recurrent import capture_recurrent_layers
from zowrap.compiler.scans import capture_scans
from zowrap.errors import ZOCaptureError, ZOError, ZOWarning, first_line
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import Batch, LossModule
from zowrap.loss.nested import flatten_batch, is_joined, nest_batch

# Typical of fine-tuning on short texts; they are only hints, every size runs. Neither is 1, so that nothing
# specialises, and they differ, so that export does not take two sizes for the same one.
CANONICAL_ROWS = 8
CANONICAL_LENGTH = 48

# Inputs of transformers models whose second dimension is the sequence length.
_SEQUENCES = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "decoder_input_ids",
    "decoder_attention_mask", "inputs_embeds", "special_tokens_mask",
}  # fmt: skip


def batch_signature(batch: Batch) -> tuple:
    """The key that decides which program a batch needs: names, dtypes, ranks and constants, but no sizes.

    Raises:
        ZOCaptureError: the batch holds something other than tensors, numbers and strings.
    """
    for name, value in batch.items():
        if not isinstance(value, Tensor | bool | int | float | str):
            raise ZOCaptureError(
                f"the batch's {name!r} is a {type(value).__name__}, and only tensors, numbers and strings can be "
                "captured"
            )
    return tuple(
        (name, value.dtype, value.ndim) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in sorted(batch.items())
    )


def canonical_batch(batch: Batch, model: torch.nn.Module, lengths: bool = True) -> Batch:
    """Tile or cut ``batch`` to the canonical sizes in all dimensions that are known to be rows or, with ``lengths``,
    length."""
    tensors = [v for name, v in batch.items() if isinstance(v, Tensor) and v.ndim and not is_joined(name)]
    same_rows = len({v.shape[0] for v in tensors}) == 1
    length = min(CANONICAL_LENGTH, _window(model) - 1)  # the full window would fix the length of the position table
    result: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and not is_joined(name):
            if same_rows and value.ndim:
                value = _tile(value, 0, CANONICAL_ROWS)
            if lengths and _is_sequence(name, value):
                value = _tile(value, 1, length)
        result[name] = value
    joined = {name: value for name, value in batch.items() if is_joined(name)}
    if joined and same_rows and all(value.device.type != "meta" for value in joined.values()):
        rows = nest_batch(joined)
        tiled = {name: [each[i % len(each)] for i in range(CANONICAL_ROWS)] for name, each in rows.items()}
        result.update({name: v.to(joined[name].device) for name, v in flatten_batch(tiled).items()})
    return result


# The names of configurations for the positions of a text. Pictures and sounds have sizes of their own.
_WINDOWS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length")


def _window(model: torch.nn.Module) -> int:
    """The smallest text window in a model's configuration and those nested in it; a large number if there is none."""
    found = [2 * CANONICAL_LENGTH]
    configs, seen = [getattr(model, "config", None)], set()
    while configs:
        config = configs.pop()
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        values = [getattr(config, name, None) for name in _WINDOWS]
        found += [value for value in values if isinstance(value, int) and value > 2]
        configs += [each for each in vars(config).values() if hasattr(each, "to_dict") and hasattr(each, "model_type")]
    return min(found)


def _is_sequence(name: str, value: Tensor) -> bool:
    return name in _SEQUENCES and value.ndim >= 2 and not (name == "labels" and value.is_floating_point())


def _tile(value: Tensor, dim: int, size: int) -> Tensor:
    index = torch.arange(size, device=value.device) % max(value.shape[dim], 1)
    return value.index_select(dim, index)


@dataclass(frozen=True)
class Freedom:
    """Which sizes of a batch a program leaves open.

    Attributes:
        rows: the number of rows.
        lengths: the other sizes of integers and sequences.
        floats: the other sizes of floats.
        equal: sizes that happen to be equal in the example (source and target length) are one size. Otherwise they are
            different ones, unless the model needs them to be equal.
    """

    rows: bool
    lengths: bool
    floats: bool
    equal: bool


# From the most to the least that is left open. With the last one a program serves one size alone.
FREEDOMS = (
    Freedom(rows=True, lengths=True, floats=True, equal=False),
    Freedom(rows=True, lengths=True, floats=False, equal=False),
    Freedom(rows=True, lengths=True, floats=False, equal=True),
    Freedom(rows=True, lengths=False, floats=False, equal=False),
    Freedom(rows=True, lengths=False, floats=False, equal=True),
    Freedom(rows=False, lengths=False, floats=False, equal=False),
)
ROWS_ALONE = 3  # the first of them that leaves nothing but the rows open
_TRIED = 5  # how many of them capture tries by itself


def _dynamic_shapes(batch: Batch, free: Freedom) -> dict[str, Any]:
    """Mark the dimensions of the inputs that vary. A size of 1 is one that the model may treat differently."""
    shapes: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            shapes[name] = None
            continue
        every = free.lengths and (not value.is_floating_point() or free.floats or _is_sequence(name, value))
        shapes[name] = {
            d: Dim.AUTO for d in range(value.ndim) if ((d == 0 and free.rows) or every) and value.shape[d] > 1
        }
    return shapes


def capture(loss: LossModule, batch: Batch, first: int = 0, last: int = _TRIED - 1) -> Program:
    """Capture ``loss`` as a program for every batch with the signature of ``batch``.

    A loss of the model's own that cannot be captured is left to an operator, see :mod:`zowrap.loss.deferred`.

    Args:
        loss: its model's weights are not copied; the program refers to them by name.
        batch: usually a :func:`canonical_batch`; tensors on the model's device; other values become constants.
        first, last: numbers of :data:`FREEDOMS`, tried in order.

    Raises:
        ZOCaptureError: export cannot express the model; the message names the first obstacle.
    """
    problem: Exception | None = None
    ways = [False, True]  # whether the loss is left to an operator
    if loss.depends_on_values or any(map(is_joined, batch)):
        del ways[0]
    # A loss that branches on values is left to an operator rather than captured once for each of its ways.
    for branching in (False, True):
        for deferred in ways:
            try:
                with loss.deferring(batch) if deferred else contextlib.nullcontext():
                    return _try_freedoms(loss, batch, range(first, last + 1), branching)
            except ZOCaptureError as error:
                if problem is None or (branching and not deferred and error.__cause__ is None):
                    problem = error.__cause__ or error  # type: ignore[assignment]
        if not isinstance(problem, GuardOnDataDependentSymNode):
            break
    if isinstance(problem, ZOCaptureError):
        raise problem
    text = first_line(problem, "")
    raise ZOCaptureError(
        f"torch.export cannot capture this model ({type(problem).__name__}: {text[:200]})"
    ) from problem


def _try_freedoms(loss: LossModule, batch: Batch, numbers: Iterable[int], branching: bool) -> Program:
    """Capture with the first of some freedoms for which that succeeds, and leaves the numbers of rows open.

    Where a picture's height and width are open, but not for the model, export may fix the number of pictures with them;
    where the rows stay fixed whatever is tried, the first program that there was is taken.

    Args:
        branching: the model may branch on values of the batch, see :mod:`zowrap.compiler.branches`.

    Raises:
        ZOCaptureError: none does; caused by the error of the first.
    """
    problem: Exception | None = None
    tried: list[tuple[Any, bool]] = []
    found: Program | None = None
    branches: Branches | None = None
    for number in numbers:
        free = FREEDOMS[number]
        if found is not None and (free.equal or not free.rows):
            continue
        shapes = (_dynamic_shapes(batch, free),)
        if (shapes, free.equal) in tried:  # happens if no input is a float, or none has a length
            continue
        tried.append((shapes, free.equal))
        try:
            with _capturing(loss, free):
                if branching and branches is None:
                    branches = Branches.record(lambda: loss(batch))
                with contextlib.nullcontext() if branches is None else branches.answering(loss):
                    exported = torch.export.export(loss, (dict(batch),), dynamic_shapes=shapes, strict=False)
                if _needs_functionalising(exported):
                    exported = exported.run_decompositions({})
        except ZOCaptureError as error:
            problem = problem or error
            continue
        except ZOError:
            raise
        except Exception as error:
            problem = problem or error
            continue
        program = _build_program(exported, branches)
        program.freedom = number
        if not free.rows or not _fixes_rows(program, batch):
            return program
        found = found or program
    if found is not None:
        return found
    raise ZOCaptureError("torch.export cannot capture this model") from problem


@contextlib.contextmanager
def _capturing(loss: LossModule, free: Freedom) -> Iterator[None]:
    """While inside, export captures what it could not otherwise, and prints nothing."""
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        size_oblivious(use_duck_shape=free.equal),
        accept_single_rows(),
        ask_before_squeezing(),
        evaluation_mode(loss),
        capture_conversions(),
        capture_recurrent_layers(),
        capture_scans(loss.model),
        capture_experts(loss.model),
        capture_lengths(loss.model),
        capture_masks(),
        capture_pictures(loss.model),
        _silence_export(),
    ):
        warnings.simplefilter("ignore")
        yield


def _fixes_rows(program: Program, batch: Batch) -> bool:
    """Whether the number of rows of some tensor of the batch is not open."""
    given = {each.target: value for each, value in zip(program.inputs, program.fakes(), strict=True)}
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    return any(value.shape[0] > 1 and isinstance(given[name].shape[0], int) for name, value in tensors.items())


@contextlib.contextmanager
def _silence_export() -> Iterator[None]:
    """Silence what export prints and logs on each failed attempt: :func:`capture` reports the failure in one sentence.

    ``ZOWRAP_DEBUG=1`` lets everything through.
    """
    if os.environ.get("ZOWRAP_DEBUG"):
        yield
        return
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, names = log.level, vars(trace)
    log.setLevel(logging.ERROR)
    names["print"] = lambda *_, **__: None  # in that module only: what a forward prints is the user's
    try:
        yield
    finally:
        log.setLevel(level)
        del names["print"]


def _needs_functionalising(exported: torch.export.ExportedProgram) -> bool:
    """Whether the graph writes to tensors or holds subgraphs. Most do not, and tracing them again takes seconds."""
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "get_attr" or (schema is not None and schema.is_mutable):
            return True
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
    return False


def _build_program(exported: torch.export.ExportedProgram, branches: Branches | None = None) -> Program:
    kinds = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
        InputKind.USER_INPUT: "batch",
    }
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ZOCaptureError(f"the model contains a subgraph ({node.target.name()}), which is not supported")
    inputs, constants = [], {}
    names = iter(_batch_names(exported))
    for spec in exported.graph_signature.input_specs:
        if spec.kind not in kinds:
            raise ZOCaptureError(f"the model needs an input of kind {spec.kind.name}, which is not supported")
        kind = kinds[spec.kind]
        target = next(names) if kind == "batch" else str(spec.target)
        if kind == "constant" or (kind == "buffer" and not spec.persistent):
            constants[target] = exported.constants[target]
        inputs.append(Input(spec.arg.name, kind, target))
    program = Program(exported.graph_module, inputs, constants, _fake_mode(exported))
    given = {g.target: v for g, v in zip(inputs, program.fakes(), strict=True) if g.kind == "batch"}
    sizes = {name: value.shape for name, value in given.items() if isinstance(value, Tensor)}
    taken = _drop_mutations(program, exported, 0 if branches is None else len(branches.numbers))
    values = None
    if branches is not None:
        sources = [(g.kind, constants[g.target] if g.kind == "constant" else g.target) for g in inputs]
        symbols = {s for shape in sizes.values() for size in shape for s in free_symbols(size)}
        values = BatchNumbers(program.graph_module, taken, sources, branches, program.fake_mode.shape_env, symbols)
    program.guards = Guards(sizes, program.fake_mode.shape_env, values)
    program.finish("capture")
    return program


def _batch_names(exported: torch.export.ExportedProgram) -> list[str]:
    """The batch's keys in the order of the placeholders, which is that of the dict that export got as argument."""
    (example,), _ = exported.example_inputs
    return list(example)


def _fake_mode(exported: torch.export.ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            return node.meta["val"].fake_mode
    raise ZOCaptureError("the captured program has no tensors")


def _drop_mutations(program: Program, exported: torch.export.ExportedProgram, taken: int) -> list[fx.Node]:
    """Remove writes to buffers (running statistics, counters), which must not happen at perturbed points.

    Returns:
        the nodes of the last ``taken`` outputs, which are no outputs any more.
    """
    outputs = exported.graph_signature.output_specs
    kept, dropped = [], []
    for spec, value in zip(outputs, program.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            dropped.append(str(spec.target))
        else:
            raise ZOCaptureError(f"the model's forward changes its inputs ({spec.kind.name}), which is not supported")
    first = len(kept) - taken
    program.graph.output_node().args = (tuple(kept[:first]),)
    if dropped:
        program.notes["capture"] = f"writes to buffers dropped: {', '.join(dropped)}"
        warnings.warn(
            f"the model's forward updates its buffers ({', '.join(dropped)}): they do not change during tuning",
            ZOWarning,
            stacklevel=2,
        )
    return kept[first:]
