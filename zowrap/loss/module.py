"""The loss of a batch as per-row sums and weights.

Everything downstream needs the loss in two parts: ``sums`` and ``weights``, one entry per example, with
f = Σ sums / Σ weights. Micro-batches then combine exactly (a mean of means is wrong when lengths differ) and a
population reads each example's own loss. For the known heads we compute them from the logits in float32; a model whose
own loss is something else keeps its own, as one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.evaluation_mode import evaluation_mode

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
    inner = _without_adapters(model)
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


# --- is the model's own loss the one that its head announces? ------------------------------------------------------

# What transformers' models read beside labels. Anything else that a model of another class reads may be in its loss.
_INPUTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values", "labels"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
}
PROBE_ROWS = 8  # of a probe's batch: one class that all probes share, and seven others
# Beyond this many classes probes would cost more than a first step; the model's own loss then stays.
MOST_CLASSES = 1024


def _is_transformers_own(model: nn.Module) -> bool:
    """Whether the loss is computed by transformers' code alone: its class as it is, and nothing put in its place."""
    inner = _without_adapters(model)
    places = (type(inner).__module__, getattr(type(inner).forward, "__module__", ""))
    replaced = {"forward", "loss_function", "_loss_function"} & {*vars(inner), *inner._modules}
    hooked = bool(inner._forward_hooks)
    return all(place.startswith("transformers.models.") for place in places) and not replaced and not hooked


def _without_adapters(model: nn.Module) -> Any:
    """The model inside peft's, which computes the loss."""
    inner: Any = model
    while type(inner).__name__.startswith("PeftModel") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def _first_rows(batch: Batch, count: int) -> Batch:
    return {name: v[:count] if isinstance(v, Tensor) and v.ndim else v for name, v in batch.items()}


def probes(batch: Batch, config: Any, labels_are_tokens: bool) -> Iterator[Batch]:
    """Batches with labels that tell a loss of weighted, smoothed or masked labels from the plain one.

    Of class labels each probe holds class 0 beside others, until every class was there: what weighs one of them
    otherwise changes a mean. Token labels become random tokens, and the special ones. Floating-point labels are given
    as they are, and as their distance from 1.

    Args:
        batch: with ``labels``; its inputs are used over and over.
        config: of the model, which names the classes and the special tokens.
        labels_are_tokens: labels of more than one position are token ids, and not classes of tokens.

    Yields:
        Nothing where the labels have no kind that probes are known for, or a tensor has no row for each example.
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
        for special in ([], _special_tokens(text) if labels_are_tokens else []):
            drawn = torch.randint(size, wide["labels"].shape, generator=draw).to(labels.device, labels.dtype)
            if special:
                of = torch.tensor(special, dtype=labels.dtype, device=labels.device)
                drawn = torch.where(drawn % 2 == 0, of[drawn // 2 % len(of)], drawn)
            yield {**wide, "labels": torch.where(counted, drawn, IGNORED)}


def _special_tokens(config: Any) -> list[int]:
    found = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        found += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)]
    return sorted({each for each in found if 0 <= each < (getattr(config, "vocab_size", 0) or 0)})


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
        """Keep the model's own loss where ours from the logits is not the same function.

        A head may add a regulariser, weigh classes, smooth or shift labels in its own way. The two are compared on the
        batch's own labels and, unless the loss is one that transformers itself computes, on labels made to tell them
        apart (:func:`probes`): a weight of a class shows only beside another class. Where the probes cannot tell, the
        model's own loss stays. Where its own loss cannot be had (it needs values the batch lacks), ours stands. Done
        once, on the first batch with labels on which the loss can be had.
        """
        if self.settled or (self.head is not None and "labels" not in batch):
            return
        self.settled = self.head is None or self._compare(batch)

    def _compare(self, batch: Batch) -> bool:
        """Give up our loss where the model's own is another number, or may be on other labels.

        Returns:
            Whether the batch told: one without a label to learn from has no loss to compare.
        """
        labels = batch["labels"]
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all()):
            return False
        with evaluation_mode(self):
            few = _first_rows(batch, 2)
            if isinstance(labels, Tensor) and labels.ndim and bool((few["labels"] == IGNORED).all()):
                few = batch
            same = self._agrees(few)
            if same and not _is_transformers_own(self.model):
                if any(isinstance(value, Tensor) and name not in _INPUTS for name, value in batch.items()):
                    same = False  # weights of rows, say: what is in this batch need not be what comes later
                names = [base.__name__ for base in type(_without_adapters(self.model)).__mro__]
                tokens = not any(name.endswith("ForTokenClassification") for name in names)
                tried = probes(batch, getattr(self.model, "config", None), labels_are_tokens=tokens)
                found = [self._agrees(probe, told_apart=True) for probe in tried]
                same = same and bool(found) and all(found)
        if same is False:
            self.head = None
        return True

    def _agrees(self, batch: Batch, told_apart: bool = False) -> bool | None:
        """Whether the model's own loss of a batch is ours; None where its own cannot be had.

        Args:
            told_apart: the rows' losses must differ, so that a mean that weighs them otherwise is another number.
        """
        sums, weights = self(batch)
        try:
            extra = {"use_cache": False} if hasattr(getattr(self.model, "config", None), "use_cache") else {}
            own = self.model(**batch, **extra).loss
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return None
        if own is None or own.ndim:
            return None
        ours = sums.sum() / weights.sum()
        # A model in 16 bit computes its own loss from rounded numbers; in float32 the two agree to rounding.
        rtol = 1e-4 if all(p.dtype == torch.float32 for p in self.model.parameters()) else 2e-2
        each = sums / weights.clamp(min=1)
        if told_apart and not (each.max() - each.min()) > 10 * rtol * ours.abs():
            return False
        return torch.allclose(ours, own.float(), rtol=rtol, atol=1e-6, equal_nan=True)


def shift_right(labels: Tensor, config: Any) -> Tensor:
    """Decoder inputs of an encoder–decoder from its labels: start token first, ``-100`` replaced by padding."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    start = pad if start is None else start
    first = torch.full_like(labels[:, :1], start)
    return torch.cat((first, torch.where(labels == IGNORED, pad, labels)[:, :-1]), dim=1)
