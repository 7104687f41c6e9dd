"""Compute the loss of a batch as sums and weights per row.

The loss has two parts, ``sums`` and ``weights``, with one entry per example and f = Σ sums / Σ weights. This way
micro-batches combine exactly (a mean of means is wrong when lengths differ) and a population gets each example's own
loss. For known heads both are computed from the logits in float32; a model with any other loss keeps its own, as a
single row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOCaptureError, ZOError, first_line
from zowrap.loss import deferred
from zowrap.loss.evaluation_mode import evaluation_mode
from zowrap.loss.heads import (
    FORMS,
    IGNORED,
    Batch,
    aligned_loss,
    causal_loss,
    class_loss,
    convert_labels,
    find_head,
    find_invalid_labels,
    names_of_kind,
    pad_for_prompt,
    shift_labels_right,
    sum_token_losses,
    token_losses,
    weighs_tokens,
    without_adapters,
)
from zowrap.loss.judging import find_loss, judge, takes
from zowrap.loss.nested import nest_batch

__all__ = [
    "IGNORED",
    "Batch",
    "LossFn",
    "LossModule",
    "count_rows",
    "find_invalid_labels",
    "pad_for_prompt",
    "per_example_names",
    "select_example",
    "sum_token_losses",
    "token_losses",
]

LossFn = Callable[[nn.Module, Batch], Tensor]


def count_rows(batch: Batch) -> int:
    """Count the examples of a batch: the first dimension of the labels, or else of the first tensor that has one."""
    labels = batch.get("labels")
    tensors = [v for v in (labels, *batch.values()) if isinstance(v, Tensor) and v.ndim]
    return tensors[0].shape[0] if tensors else 1


def per_example_names(batch: Batch) -> set[str]:
    """The names of the tensors in a population's batch that have one row per example; examples share the others.

    A shared tensor must be 0-d or have a single row: any other number of rows would, in some batch, happen to equal
    the number of examples and be misread.

    Raises:
        ZOError: a tensor has another number of rows.
    """
    rows = count_rows(batch)
    sizes = {name: v.shape[0] for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    for name, size in sizes.items():
        if size not in (1, rows):
            raise ZOError(
                f"in a population every tensor of the batch must have a row for each example, or one row that all "
                f"share: {name!r} has {size} for {rows} example{'s' * (rows != 1)} (the number of rows of the labels, "
                f"or else of the first tensor)"
            )
    return {name for name, size in sizes.items() if size == rows}


def select_example(batch: Batch, row: int) -> Batch:
    """Select one example as a batch of its own, with the tensors that all examples share."""
    own = per_example_names(batch)
    return {name: v[row : row + 1] if name in own else v for name, v in batch.items()}


class LossModule(nn.Module):
    """Wraps a model and its loss: ``forward(batch) -> (sums, weights)``, which engines capture or run.

    Args:
        model: the caller puts it into evaluation mode.
        loss_fn: ``loss_fn(model, batch)`` returning a 0-d loss, or per-example losses ``[batch]``.
        per_example: each example's own loss is needed, so ``loss_fn`` must return them.

    Attributes:
        head: computes the loss from the logits; None if the model's own loss or ``loss_fn`` does.
        settled: whether the choice of ``head`` is final, see :meth:`settle`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None = None, per_example: bool = False) -> None:
        super().__init__()
        self.per_example = per_example
        self.model = model
        self.loss_fn = loss_fn
        self.settled = False
        self._kinds: set[frozenset[Any]] = set()
        self._deferred: deferred.DeferredLoss | None = None
        self.head = None if loss_fn is not None else find_head(model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute sums and weights of a batch, flat or nested (:mod:`zowrap.loss.nested`)."""
        if self._deferred is not None:
            return self.weigh(find_loss(self._deferred(convert_labels(batch, self.model))), batch)
        batch = nest_batch(batch)
        if self.loss_fn is not None:
            given = self.loss_fn(self.model, batch)
            if self.per_example and isinstance(given, Tensor) and not given.ndim:
                raise ZOError(
                    "a population needs the loss of each example: loss_fn must return [batch], not one number"
                )
            return self.weigh(given, batch)
        batch = convert_labels(batch, self.model)
        if self.head is not None and "labels" in batch:
            return self.head(self._logits(batch), batch, self.model)
        loss = self._own(batch)
        if loss is None:
            raise ZOError(
                "the model returned no loss: put 'labels' into the batch, or give loss_fn=(lambda model, batch: ...)"
            )
        return self.weigh(loss, batch)

    @contextmanager
    def deferring(self, batch: Batch) -> Iterator[None]:
        """Inside, :meth:`forward` leaves the model's own loss to an operator, see :mod:`zowrap.loss.deferred`.

        Args:
            batch: a flat one, on which the forward is run once.

        Raises:
            ZOCaptureError: the loss is not the model's own, or cannot be kept apart from its forward.
        """
        if self.loss_fn is not None or self.head is not None or self.per_example:
            raise ZOCaptureError(
                "a batch with lists of dictionaries can only be compiled for a loss that the model computes itself"
            )
        try:
            with torch.no_grad(), evaluation_mode(self):
                self._deferred = deferred.DeferredLoss(self.model, self._call, convert_labels(batch, self.model))
        except ZOError:
            raise
        except Exception as error:
            raise ZOCaptureError(f"the model cannot compute its loss of such a batch ({first_line(error)})") from error
        try:
            yield
        finally:
            self._deferred = None

    @property
    def depends_on_values(self) -> bool:
        """Whether the loss is known not to be captured, so that it is deferred at once."""
        return self.loss_fn is None and self.head is None and deferred.depends_on_values(self.model)

    @property
    def form(self) -> str:
        """The kind of loss that a run records: ``"own"``, ``"given"``, ``"unsettled"`` or a head's name."""
        if self.loss_fn is not None:
            return "given"
        if not self.settled:
            return "unsettled"
        return "own" if self.head is None else FORMS[self.head]

    @property
    def classes(self) -> int | None:
        """The number of classes, whose labels count from 0; None unless the loss is that of a known head."""
        config = getattr(self.model, "config", None)
        if self.head is None or config is None:
            return None
        kinds = names_of_kind(self.model)
        if self.head is class_loss or any(kind.endswith("ForTokenClassification") for kind in kinds):
            count = getattr(config, "num_labels", None)
            return count if isinstance(count, int) and count > 1 else None
        model: Any = self.model
        try:
            return getattr(model.get_output_embeddings(), "out_features", None)
        except (AttributeError, NotImplementedError):
            return None

    def settle_as(self, form: str) -> None:
        """Use the loss that a run was started with (:attr:`form`), whatever the next batch suggests."""
        if self.loss_fn is None and form != "unsettled":
            self.settled = True
            self.head = None if form == "own" else find_head(self.model)

    def _logits(self, batch: Batch) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        config = getattr(self.model, "config", None)
        translates = self.head is aligned_loss and getattr(config, "is_encoder_decoder", False)
        if translates and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shift_labels_right(batch["labels"], config)
        if getattr(config, "return_dict", True) is False:
            inputs["return_dict"] = True
        return self._call(inputs)

    def _own(self, batch: Batch) -> Any:
        """The loss that the model computes itself, or None."""
        return find_loss(self._call(batch))

    def _call(self, inputs: Batch) -> Any:
        if hasattr(getattr(self.model, "config", None), "use_cache") and takes(self.model, "use_cache"):
            inputs = {"use_cache": False, **inputs}
        if weighs_tokens(self.model):  # peft writes to these
            inputs = {n: v.clone() if n == "input_type_mask" else v for n, v in inputs.items()}
        try:
            return self.model(**inputs)
        except TypeError as error:
            if _accepts(self.model, inputs):
                raise
            raise ZOError(
                f"the model cannot be called with this batch ({first_line(error)}): give "
                "loss_fn=(lambda model, batch: ...), which calls it in its own way"
            ) from error

    def weigh(self, loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Convert a loss to (sums, weights). Per-example losses have weight 1; a 0-d mean has the weight of what it
        averages: the label tokens (without the first of each row in a causal model), or else the examples.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.ndim > 1:
            kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ZOError(f"the loss must be a floating-point tensor, 0-d or one value per example, not {kind}")
        loss = loss.float()
        if loss.ndim == 1:
            return loss, torch.ones_like(loss)
        counted = self._count_labels(batch.get("labels"))
        if counted is not None:
            weight = counted.float().reshape(1)
        else:
            rows = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
            weight = torch.ones(1, device=loss.device) * rows
        return loss.reshape(1) * weight, weight

    def _count_labels(self, labels: Any) -> Tensor | None:
        """The number of labels that the model's own loss is a mean over; None if that is over rows."""
        if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
            return None
        inner = without_adapters(self.model)
        kinds = names_of_kind(inner)
        if any(kind.endswith(("ForCTC", "ForRNNT", "ForTDT")) for kind in kinds):
            return None  # the loss of a row is divided by its length already
        ignored = IGNORED
        if any(kind.endswith("ForSemanticSegmentation") for kind in kinds):
            ignored = getattr(inner.config, "semantic_loss_ignore_index", 255)
        if find_head(self.model) is causal_loss:
            labels = labels[:, 1:]
        return (labels != ignored).sum()

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Decide between our loss from the logits and the model's own, on the first batch with usable labels.

        Ours stays only where it is provably the model's (:func:`zowrap.loss.judging.judge`); it is also used where the
        model computes none. A later batch with other inputs or constants is judged again, because they may change what
        the loss is.
        """
        if self.head is None or "labels" not in batch:
            self.settled = self.settled or self.head is None
            return
        kind = frozenset(name if isinstance(value, Tensor) else (name, repr(value)) for name, value in batch.items())
        if self.settled and not self._kinds:  # by the state of a run
            self._kinds.add(kind)
        if self.settled and kind in self._kinds:
            return
        verdict = self._judge(convert_labels(batch, self.model))
        if verdict is not None:
            self._kinds.add(kind)
            self.settled = True
            self.head = self.head if verdict else None

    def _judge(self, batch: Batch) -> bool | None:
        labels = batch["labels"]
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all()):
            return None  # there is no loss to compare
        assert self.head is not None
        with evaluation_mode(self):
            return judge(self.model, self.head, self, self._own, batch)


def _accepts(model: nn.Module, batch: Batch) -> bool:
    """Whether the names in a batch are arguments of the model's forward, and all that it needs."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True
