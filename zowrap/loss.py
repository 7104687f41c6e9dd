"""The loss of a batch as per-row sums and weights.

Everything downstream needs the loss in two parts: ``sums`` and ``weights``, one entry per example, with
f = Σ sums / Σ weights. Micro-batches then combine exactly (a mean of means is wrong when lengths differ) and a
population reads each example's own loss. For the known heads we compute them from the logits in float32; a model whose
own loss is something else keeps its own, as one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.modes import evaluation_mode

Batch = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # torch's and transformers' ignore_index


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy per row, :func:`token_sums`, and float32 ``[rows]`` numbers of counted positions."""
    counts = (labels != IGNORED).sum(-1).float()
    if torch.compiler.is_exporting():  # one node, which passes.fuse_head joins with the head or writes out
        return torch.ops.zowrap.token_losses(logits, labels), counts
    return token_sums(logits, labels), counts


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per row, in float32.

    Args:
        logits: ``[rows, positions, classes]`` of any float dtype.
        labels: int64 ``[rows, positions]``; ``-100`` is ignored; a label that names no class makes the loss NaN (an
            index error would end the process inside compiled code).

    Returns:
        float32 ``[rows]`` sums over the positions.
    """
    logits = logits.float()
    counted = labels != IGNORED
    classes = logits.shape[-1]
    picked = logits.gather(-1, labels.clamp(0, classes - 1).unsqueeze(-1)).squeeze(-1)
    picked = torch.where((labels < 0) | (labels >= classes), torch.nan, picked)
    losses = torch.where(counted, logits.logsumexp(-1) - picked, 0.0)
    return losses.sum(-1)


def _causal(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    return token_losses(output.logits[:, :-1], batch["labels"][:, 1:])


def _aligned(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    return token_losses(output.logits, batch["labels"])


def _classes(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    logits, labels = output.logits.float(), batch["labels"]
    if not labels.is_floating_point() and logits.shape[-1] > 1:
        return token_losses(logits.unsqueeze(1), labels.reshape(-1, 1))
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
    else:
        losses = (logits.reshape(labels.shape) - labels.float()).square().reshape(labels.shape[0], -1).mean(-1)
    return losses, torch.ones_like(losses)


# Which head a class name announces, in the vocabulary of transformers; anything else keeps its own loss.
_HEADS: tuple[tuple[str, Callable[..., tuple[Tensor, Tensor]]], ...] = (
    ("ForConditionalGeneration", _aligned),
    ("ForMaskedLM", _aligned),
    ("ForTokenClassification", _aligned),
    ("ForSequenceClassification", _classes),
    ("ForCausalLM", _causal),
    ("LMHeadModel", _causal),
)


def _head_of(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    inner: Any = model
    while type(inner).__name__.startswith("PeftModel") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "config"):
        return None
    names = [base.__name__ for base in type(inner).__mro__]
    head = next((head for name in names for ending, head in _HEADS if name.endswith(ending)), None)
    if head is _aligned and any(n.endswith("ForConditionalGeneration") for n in names):
        return _aligned if getattr(inner.config, "is_encoder_decoder", False) else _causal
    return head


def labels_out_of_range(labels: Tensor, classes: int) -> Tensor:
    """bool, shaped as the labels: which name no class."""
    return ((labels < 0) & (labels != IGNORED)) | (labels >= classes)


def rows_of(batch: Batch) -> int:
    """Number of examples: the first dimension of the labels, or else of the first tensor that has one."""
    labels = batch.get("labels")
    tensors = [v for v in (labels, *batch.values()) if isinstance(v, Tensor) and v.ndim]
    return tensors[0].shape[0] if tensors else 1


def per_example_names(batch: Batch) -> set[str]:
    """Which tensors of a population's batch have a row for each example.

    All examples share the others: what has no dimension, or one row. Any other number of rows would be the number of
    examples in some batch by chance, and mean another thing there.

    Raises:
        ZOError: a tensor has another number of rows.
    """
    rows = rows_of(batch)
    sizes = {name: v.shape[0] for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
    for name, size in sizes.items():
        if size not in (1, rows):
            raise ZOError(
                f"in a population every tensor of the batch has a row for each example, or one row that all share: "
                f"{name!r} has {size} for {rows} example{'s' * (rows != 1)} (counted by the labels, or else by the "
                f"first tensor)"
            )
    return {name for name, size in sizes.items() if size == rows}


def example(batch: Batch, row: int) -> Batch:
    """One example as a batch of one; what does not have a row for each example is shared by all."""
    own = per_example_names(batch)
    return {name: v[row : row + 1] if name in own else v for name, v in batch.items()}


class LossModule(nn.Module):
    """``forward(batch) -> (sums, weights)`` around a model and its loss: what is captured, and what the oracle runs.

    Args:
        model: evaluated as it is; the caller puts it in evaluation mode.
        loss_fn: ``loss_fn(model, batch)`` returning a 0-d loss, or ``[batch]`` per-example losses.
        per_example: each example's own loss is needed, so a given ``loss_fn`` must return them.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None = None, per_example: bool = False) -> None:
        super().__init__()
        self.per_example = per_example
        self.model = model
        self.loss_fn = loss_fn
        self.settled = False
        self.head = None if loss_fn is not None else _head_of(model)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.loss_fn is not None:
            given = self.loss_fn(self.model, batch)
            if self.per_example and isinstance(given, Tensor) and not given.ndim:
                raise ZOError(
                    "a population needs the loss of each example: loss_fn must return [batch], not one number"
                )
            return self._as_rows(given, batch)
        if self.head is not None and "labels" in batch:
            return self.head(self._logits(batch), batch, self.model)
        output = self.model(**batch)
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is None:
            raise ZOError(
                "the model returned no loss: put 'labels' in the batch or give loss_fn=(lambda model, batch: ...)"
            )
        return self._as_rows(loss, batch)

    @property
    def form(self) -> str:
        """Which loss this is, to be kept with a run: ``"own"``, ``"given"``, ``"unsettled"`` or a head's name."""
        if self.loss_fn is not None:
            return "given"
        if not self.settled:
            return "unsettled"
        return "own" if self.head is None else self.head.__name__.strip("_")

    @property
    def classes(self) -> int | None:
        """How many classes a label may name, numbered from 0; None where the loss is not a known head's."""
        config = getattr(self.model, "config", None)
        if self.head is None or config is None:
            return None
        kinds = [base.__name__ for base in type(self.model).__mro__]
        if self.head is _classes or any(kind.endswith("ForTokenClassification") for kind in kinds):
            count = getattr(config, "num_labels", None)
            return count if isinstance(count, int) and count > 1 else None
        model: Any = self.model
        try:
            return getattr(model.get_output_embeddings(), "out_features", None)
        except (AttributeError, NotImplementedError):
            return None

    def settle_as(self, form: str) -> None:
        """Take the loss that a run was started with (:attr:`form`), whatever the next batch suggests."""
        if self.loss_fn is None and form != "unsettled":
            self.settled = True
            self.head = None if form == "own" else _head_of(self.model)

    def _logits(self, batch: Batch) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        config = getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            if "decoder_input_ids" not in inputs:
                inputs["decoder_input_ids"] = shift_right(batch["labels"], config)
            return self.model(**inputs, use_cache=False)
        if hasattr(config, "use_cache"):
            inputs["use_cache"] = False
        return self.model(**inputs)

    def _as_rows(self, loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """A loss as (sums, weights): ``[batch]`` counts each example once; a 0-d mean weighs as what it averages.

        That is the label tokens (less the first of each row where the model is causal), or else the examples.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.ndim > 1:
            kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ZOError(f"the loss must be a floating-point tensor, 0-d or one value per example, not {kind}")
        loss = loss.float()
        if loss.ndim == 1:
            return loss, torch.ones_like(loss)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            if _head_of(self.model) is _causal:
                labels = labels[:, 1:]
            weight = (labels != IGNORED).sum().float().reshape(1)
        else:
            rows = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
            weight = torch.ones(1, device=loss.device) * rows
        return loss.reshape(1) * weight, weight

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Keep the model's own loss where ours from the logits is not the same number on (two rows of) ``batch``.

        A head may add a regulariser, weigh classes or shift labels in its own way. Where its own loss cannot be had
        (it needs values the batch lacks), ours stands. Done once, on the first batch with labels on which the loss can
        be had.
        """
        if self.settled or (self.head is not None and "labels" not in batch):
            return
        if self.head is not None:
            self._compare(batch)
        self.settled = True

    def _compare(self, batch: Batch) -> None:
        """Give up our loss where the model's own is another number."""
        few = {name: v[:2] if isinstance(v, Tensor) and v.ndim else v for name, v in batch.items()}
        with evaluation_mode(self):
            sums, weights = self(few)
            try:
                extra = {"use_cache": False} if hasattr(getattr(self.model, "config", None), "use_cache") else {}
                own = self.model(**few, **extra).loss
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                return
        if own is None or own.ndim:
            return
        ours = sums.sum() / weights.sum()
        # A model in 16 bit computes its own loss from rounded numbers; in float32 the two agree to rounding.
        rtol = 1e-4 if all(p.dtype == torch.float32 for p in self.model.parameters()) else 2e-2
        if not torch.allclose(ours, own.float(), rtol=rtol, atol=1e-6, equal_nan=True):
            self.head = None


def shift_right(labels: Tensor, config: Any) -> Tensor:
    """Decoder inputs of an encoder–decoder from its labels: start token first, ``-100`` replaced by padding."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    start = pad if start is None else start
    first = torch.full_like(labels[:, :1], start)
    return torch.cat((first, torch.where(labels == IGNORED, pad, labels)[:, :-1]), dim=1)
