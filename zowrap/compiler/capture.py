"""From a model and its loss to a program, by ``torch.export``.

The example batch that export sees is brought to fixed canonical sizes first, never the sizes of whatever batch came
first: compilers take hints from it, and a resumed run must compile the same code. A model that does something else at
other sizes is captured there with a batch as it comes: what it compiles then, down to the last bits of a loss, may be
another thing in a run that is resumed between such batches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.export._trace as trace
from torch import Tensor
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from zowrap.compiler.guards import Guards
from zowrap.compiler.inductor import size_oblivious
from zowrap.compiler.program import Input, Program
from zowrap.compiler.recurrent import recurrent_layers
from zowrap.errors import ZOCaptureError, ZOError, ZOWarning, first_line
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.module import Batch, LossModule

# Typical of fine-tuning on short texts; they are hints, every size runs. Both differ from 1 so that nothing
# specialises, and from each other so that no two sizes are taken for the same one.
CANONICAL_ROWS = 8
CANONICAL_LENGTH = 48

# Inputs of transformers models whose second dimension is the sequence length.
_SEQUENCES = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "decoder_input_ids",
    "decoder_attention_mask", "inputs_embeds", "special_tokens_mask",
}  # fmt: skip


def signature(batch: Batch) -> tuple:
    """What decides which program a batch needs: names, dtypes, ranks and constants, never batch size or length.

    Raises:
        ZOCaptureError: the batch holds something else than tensors, numbers and texts.
    """
    for name, value in batch.items():
        if not isinstance(value, Tensor | bool | int | float | str):
            raise ZOCaptureError(
                f"the batch's {name!r} is a {type(value).__name__}, and only tensors, numbers and texts can be captured"
            )
    return tuple(
        (name, value.dtype, value.ndim) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in sorted(batch.items())
    )


def canonical_batch(batch: Batch, model: torch.nn.Module) -> Batch:
    """``batch`` tiled or cut to the canonical sizes wherever its dimensions are known to be rows or length."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim]
    same_rows = len({v.shape[0] for v in tensors}) == 1
    window = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = CANONICAL_LENGTH
    if isinstance(window, int) and window > 2:
        length = min(length, window - 1)  # at the window itself a slice of the positions is the whole: a fixed size
    result: Batch = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            if same_rows and value.ndim:
                value = _tile(value, 0, CANONICAL_ROWS)
            if _is_sequence(name, value):
                value = _tile(value, 1, length)
        result[name] = value
    return result


def _is_sequence(name: str, value: Tensor) -> bool:
    return name in _SEQUENCES and value.ndim >= 2 and not (name == "labels" and value.is_floating_point())


def _tile(value: Tensor, dim: int, size: int) -> Tensor:
    index = torch.arange(size, device=value.device) % max(value.shape[dim], 1)
    return value.index_select(dim, index)


def _dynamic(batch: Batch, floats_too: bool, lengths: bool) -> dict[str, Any]:
    """Which dimensions of the inputs vary: rows always; others of integer inputs; others of float inputs if asked."""
    shapes: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            shapes[name] = None
            continue
        every = lengths and (not value.is_floating_point() or floats_too or _is_sequence(name, value))
        shapes[name] = {d: Dim.AUTO for d in range(value.ndim) if (d == 0 or every) and value.shape[d] > 1}
    return shapes


def capture(loss: LossModule, batch: Batch) -> Program:
    """The program of ``loss`` for every batch that looks like ``batch``.

    Args:
        loss: its model's weights stay where they are; the program refers to them by name.
        batch: usually a :func:`canonical_batch`; tensors on the model's device; other values become constants.

    Raises:
        ZOCaptureError: export cannot express the model; the message names the first obstacle.
    """
    problem: Exception | None = None
    tried: list[tuple[Any, bool]] = []
    # Every size dynamic where export can do it, else those of integer inputs, else the number of rows alone. Two sizes
    # that happen to be equal here (source and target length) are different symbols, unless the model needs them equal.
    for lengths, floats, equal in (
        (True, True, False),
        (True, False, False),
        (True, False, True),
        (False, False, False),
        (False, False, True),
    ):
        shapes = (_dynamic(batch, floats, lengths),)
        if (shapes, equal) in tried:  # where no input is a float, or none has more than rows
            continue
        tried.append((shapes, equal))
        sizes = size_oblivious(use_duck_shape=equal)
        try:
            with (
                warnings.catch_warnings(),
                torch.no_grad(),
                sizes,
                evaluation_mode(loss),
                recurrent_layers(),
                _hushed(),
            ):
                warnings.simplefilter("ignore")
                exported = torch.export.export(loss, (dict(batch),), dynamic_shapes=shapes, strict=False)
                if _needs_functionalising(exported):
                    exported = exported.run_decompositions({})
        except ZOError:
            raise
        except Exception as error:
            problem = problem or error
            continue
        return _program(exported)
    text = first_line(problem, "")
    raise ZOCaptureError(
        f"torch.export cannot capture this model ({type(problem).__name__}: {text[:200]})"
    ) from problem


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Each failed attempt of export prints its graph, twice, and logs: what failed is said by us, in one sentence.

    ``ZOWRAP_DEBUG=1`` leaves everything as it is.
    """
    if os.environ.get("ZOWRAP_DEBUG"):
        yield
        return
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, names = log.level, vars(trace)
    log.setLevel(logging.ERROR)
    names["print"] = lambda *_, **__: None  # in that module alone: what a forward prints is the user's
    try:
        yield
    finally:
        log.setLevel(level)
        del names["print"]


def _needs_functionalising(exported: torch.export.ExportedProgram) -> bool:
    """Whether the graph writes to tensors or holds subgraphs; most models' do not, and tracing again takes seconds."""
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "get_attr" or (schema is not None and schema.is_mutable):
            return True
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
    return False


def _program(exported: torch.export.ExportedProgram) -> Program:
    kinds = {
        InputKind.PARAMETER: "parameter",
        InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant",
        InputKind.USER_INPUT: "batch",
    }
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ZOCaptureError(f"the model holds a graph of its own ({node.target.name()}), which is not supported")
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
    program.guards = Guards(sizes, program.fake_mode.shape_env)
    _drop_mutations(program, exported)
    return program


def _batch_names(exported: torch.export.ExportedProgram) -> list[str]:
    """Batch keys in placeholder order: the pytree of the one positional argument, a dict."""
    (example,), _ = exported.example_inputs
    return list(example)


def _fake_mode(exported: torch.export.ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            return node.meta["val"].fake_mode
    raise ZOCaptureError("the captured program has no tensors")


def _drop_mutations(program: Program, exported: torch.export.ExportedProgram) -> None:
    """A forward that writes to its buffers (running statistics, counters) must not do so at perturbed points."""
    outputs = exported.graph_signature.output_specs
    kept, dropped = [], []
    for spec, value in zip(outputs, program.graph.output_node().args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            dropped.append(str(spec.target))
        else:
            raise ZOCaptureError(f"the model's forward changes its inputs ({spec.kind.name}), which is not supported")
    program.graph.output_node().args = (tuple(kept),)
    if dropped:
        program.notes["capture"] = f"writes to buffers dropped: {', '.join(dropped)}"
        warnings.warn(
            f"the model's forward updates its buffers ({', '.join(dropped)}); they stay as they are during tuning",
            ZOWarning,
            stacklevel=2,
        )
    program.finish("capture")
