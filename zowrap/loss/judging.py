"""Judge whether the loss of a known head is the loss that a model computes itself.

A model may add a regulariser, weigh classes, or smooth, shift or mask labels in its own way, and a first batch need not
show it. So two things must hold. The model's loss is the very tensor that a plain loss function of torch returned:
without weights, smoothing or another term (:class:`LossCalls`). And both losses are the same number on the batch and
on labels that are made to distinguish them (:func:`make_probes`), which shows what a model does to its labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zowrap.loss.heads import IGNORED, Batch, Head, class_loss, names_of_kind, without_adapters

Evaluate = Callable[[Batch], tuple[Tensor, Tensor]]

# The inputs of transformers models apart from labels. Any other input of a custom model may be part of its loss.
_INPUTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values", "labels"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
}
# Of every transformers model, these change what its loss is.
_CHANGES_LOSS = {"shift_labels", "num_items_in_batch", "ignore_index", "output_router_logits"}
PROBE_ROWS = 8  # rows of a probe: the class that all probes share, and seven others
# With more classes than this, probes would cost more than a first step; the model then keeps its own loss.
MOST_CLASSES = 1024
CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


def judge(model: nn.Module, head: Head, ours: Evaluate, own: Callable[[Batch], Any], batch: Batch) -> bool | None:
    """Judge whether ``head`` computes the model's own loss, for batches with the names and constants of this one.

    Args:
        ours: computes sums and weights with ``head``.
        own: computes the model's own loss, see :func:`find_loss`.
        batch: with labels of the dtype that the model takes, some of them to be learnt.

    Returns:
        None if that stays open, because the model cannot compute a loss of this batch.
    """
    labels = batch["labels"]
    if not isinstance(labels, Tensor) or (head is not class_loss and labels.ndim != 2):
        return False
    if any(name in _CHANGES_LOSS for name in batch):
        return False
    found = _agrees_on_some_rows(model, ours, own, batch)
    if not found:
        return found
    theirs = is_transformers_own(model)
    if not theirs and any(isinstance(value, Tensor) and name not in _INPUTS for name, value in batch.items()):
        return False  # row weights, for example, which later batches may set differently
    classes_of_tokens = any(name.endswith("ForTokenClassification") for name in names_of_kind(without_adapters(model)))
    if theirs and (head is class_loss or classes_of_tokens):
        return True
    tried = make_probes(batch, getattr(model, "config", None), labels_are_tokens=not classes_of_tokens)
    verdicts = [_agrees(model, ours, own, probe, distinct_rows=not theirs) for probe in tried]
    # Rows that cannot be repeated (patches of images) leave no probes: for transformers' own code the batch is enough.
    return all(verdicts) and (bool(verdicts) or theirs)


def find_loss(output: Any) -> Any:
    """The loss in what a model returned, or None: by name, or first in a tuple, as transformers' Trainer reads it."""
    if isinstance(output, dict):
        return output.get("loss")
    if hasattr(output, "loss"):
        return output.loss
    if isinstance(output, tuple | list) and output:
        first = output[0]
        if isinstance(first, Tensor) and first.is_floating_point() and not first.ndim:
            return first  # anything larger is what a model returns without a loss
    return None


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model takes a keyword."""
    parameters = inspect.signature(without_adapters(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_transformers_own(model: nn.Module) -> bool:
    """Whether only transformers' code computes the loss: an original class, without hooks or replaced methods."""
    inner = without_adapters(model)
    places = (type(inner).__module__, getattr(type(inner).forward, "__module__", ""))
    replaced = {"forward", "loss_function", "_loss_function"} & {*vars(inner), *inner._modules}
    hooked = bool(inner._forward_hooks)
    return all(place.startswith("transformers.models.") for place in places) and not replaced and not hooked


class LossCalls(TorchFunctionMode):
    """Inside, note which tensors a plain loss function of torch returns: a mean over all that is not ignored."""

    def __init__(self) -> None:
        super().__init__()
        self._plain: list[tuple[Tensor, int]] = []  # with their versions: something may be added in place

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _PLAIN and all(kwargs.get(name, value) == value for name, value in _PLAIN[func].items()):
            if not (func is functional.cross_entropy and args[1].is_floating_point()):
                self._plain.append((result, result._version))
        elif func in _CASTS and args[0] in self:
            self._plain.append((result, result._version))
        return result

    def __contains__(self, loss: object) -> bool:
        return any(loss is known and known._version == version for known, version in self._plain)


_REDUCED = {"size_average": None, "reduce": None, "reduction": "mean", "weight": None}
_PLAIN: dict[Any, dict[str, Any]] = {
    functional.cross_entropy: {**_REDUCED, "ignore_index": IGNORED, "label_smoothing": 0.0},
    functional.binary_cross_entropy_with_logits: {**_REDUCED, "pos_weight": None},
    functional.mse_loss: _REDUCED,
}
_CASTS = {Tensor.to, Tensor.float, Tensor.type, Tensor.half, Tensor.bfloat16, Tensor.type_as}


def _agrees_on_some_rows(model: nn.Module, ours: Evaluate, own: Callable[[Batch], Any], batch: Batch) -> bool | None:
    """:func:`_agrees` on the first rows, or on the whole batch where its tensors have no rows in common."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim]
    rows = {v.shape[0] for v in tensors}
    if len(rows) == 1 and rows.pop() > PROBE_ROWS:
        few = {name: v[:PROBE_ROWS] if isinstance(v, Tensor) and v.ndim else v for name, v in batch.items()}
        if few["labels"].is_floating_point() or bool((few["labels"] != IGNORED).any()):
            try:
                found = _agrees(model, ours, own, few)
            except CANNOT:  # as many patches of images as rows, by chance
                found = None
            if found is not None:
                return found
    return _agrees(model, ours, own, batch)


def _agrees(
    model: nn.Module,
    ours: Evaluate,
    own: Callable[[Batch], Any],
    batch: Batch,
    distinct_rows: bool = False,
) -> bool | None:
    """Whether the model's own loss of a batch is plain and equals ours; None if it cannot be computed.

    Args:
        distinct_rows: the rows' losses must differ, so that a mean with other weights would be another number.

    Raises:
        Exception: neither can be computed: the batch is wrong.
    """
    given: tuple[Tensor, Tensor] | None = None
    problem: Exception | None = None
    try:
        given = ours(batch)
    except CANNOT as error:
        problem = error
    with LossCalls() as calls:
        try:
            loss = own(batch)
        except CANNOT:
            if problem is not None:
                raise
            return None
    if given is None:
        if loss is None:
            assert problem is not None
            raise problem
        return False
    if loss is None:
        return True  # it has none
    sums, weights = given
    if not isinstance(loss, Tensor) or loss.ndim or loss not in calls:
        return False
    mean = sums.sum() / weights.sum()
    # A 16-bit model computes its own loss from rounded numbers; in float32 both agree up to rounding.
    rtol = 1e-4 if all(p.dtype == torch.float32 for p in model.parameters()) else 2e-2
    each = sums / weights.clamp(min=1)
    if distinct_rows and not (each.max() - each.min()) > 10 * rtol * mean.abs():
        return False
    return torch.allclose(mean, loss.float(), rtol=rtol, atol=1e-6, equal_nan=True)


def make_probes(batch: Batch, config: Any, labels_are_tokens: bool) -> Iterator[Batch]:
    """Make batches whose labels distinguish a loss with class weights, smoothing or masking from the plain one.

    For class labels, each probe holds class 0 and some others, until every class has appeared: a different weight for
    one of them changes a mean. Token labels become random tokens and special tokens. Floating-point labels appear
    unchanged, and as their distance from 1.

    Args:
        batch: with ``labels``; its inputs are repeated as needed.
        config: of the model, for its classes and special tokens.
        labels_are_tokens: labels with more than one position are token ids, and not classes of tokens.

    Yields:
        Batches; none if there are no probes for this kind of labels, or a tensor has no row for each example.
    """
    labels = batch["labels"]
    if not isinstance(labels, Tensor) or not labels.ndim:
        return
    rows = labels.shape[0]
    tensors = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    if any(v.shape[0] != rows for v in tensors.values()):
        return

    def repeated(count: int) -> Batch:
        picked = torch.arange(count, device=labels.device) % rows
        return {name: v[picked.to(v.device)] if name in tensors else v for name, v in batch.items()}

    if labels.is_floating_point():
        wide = repeated(max(2, min(rows, PROBE_ROWS)))
        yield wide
        yield {**wide, "labels": 1 - wide["labels"]}
    elif labels.ndim == 1 or labels.shape[1:].numel() == 1:
        classes = getattr(config, "num_labels", None) or 0
        if not 2 <= classes <= MOST_CLASSES:
            return
        for first in range(1, classes, PROBE_ROWS - 1):
            named = [0, *range(first, min(first + PROBE_ROWS - 1, classes))]
            given = torch.tensor(named, dtype=labels.dtype, device=labels.device)
            yield {**repeated(len(named)), "labels": given.reshape(-1, *labels.shape[1:])}
    else:
        wide = repeated(max(2, min(rows, PROBE_ROWS // 2)))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(text, "vocab_size", None) if labels_are_tokens else getattr(config, "num_labels", None)
        if not isinstance(size, int) or size < 2:
            return
        counted = wide["labels"] != IGNORED
        draw = torch.Generator().manual_seed(0)
        for special in ([], _find_special_tokens(text) if labels_are_tokens else []):
            drawn = torch.randint(size, wide["labels"].shape, generator=draw).to(labels.device, labels.dtype)
            if special:
                of = torch.tensor(special, dtype=labels.dtype, device=labels.device)
                drawn = torch.where(drawn % 2 == 0, of[drawn // 2 % len(of)], drawn)
            yield {**wide, "labels": torch.where(counted, drawn, IGNORED)}


def _find_special_tokens(config: Any) -> list[int]:
    found = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        found += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
    return sorted({each for each in found if 0 <= each < (getattr(config, "vocab_size", 0) or 0)})
