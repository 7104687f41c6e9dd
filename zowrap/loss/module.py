"""Compute the loss of a batch as sums and weights per row.

The loss has two parts, ``sums`` and ``weights``, with one entry per example and f = Σ sums / Σ weights. This way
micro-batches combine exactly (a mean of means is wrong when lengths differ) and a population gets each example's own
loss. For known heads both are computed from the logits in float32; a model with any other loss keeps its own, as a
single row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError, first_line
from zowrap.loss.evaluation_mode import evaluation_mode

Batch = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # torch's and transformers' ignore_index


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy per row (:func:`sum_token_losses`) and the number of counted positions, float32 ``[rows]``."""
    counts = (labels != IGNORED).sum(-1).float()
    if torch.compiler.is_exporting():  # one node, which passes.fuse_head joins with the head or writes out
        return torch.ops.zowrap.token_losses(logits, labels), counts
    return sum_token_losses(logits, labels), counts


def sum_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of each row, in float32.

    Args:
        logits: ``[rows, positions, classes]`` of any float dtype.
        labels: int64 ``[rows, positions]``; ``-100`` is ignored. A label outside the classes makes the loss NaN,
            because an index error inside compiled code would end the process.

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


def pad_for_prompt(labels: Tensor, logits: Tensor) -> Tensor:
    """Pad label tokens ``[rows, positions]`` on the left to the positions of ``logits``, which are more with a prompt.

    The last of peft's virtual tokens predicts the first label.
    """
    more = logits.shape[1] - labels.shape[1]
    return nn.functional.pad(labels, (more, 0), value=IGNORED) if more > 0 else labels


def _causal_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    labels = batch["labels"]
    if _is_prompted(model):
        labels = pad_for_prompt(labels, output.logits)
    return token_losses(output.logits[:, :-1], labels[:, 1:])


def _aligned_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    return token_losses(output.logits, batch["labels"])


def _class_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    logits, labels = output.logits.float(), batch["labels"]
    if not labels.is_floating_point() and logits.shape[-1] > 1:
        return token_losses(logits.unsqueeze(1), labels.reshape(-1, 1))
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
    else:
        losses = (logits.reshape(labels.shape) - labels.float()).square().reshape(labels.shape[0], -1).mean(-1)
    return losses, torch.ones_like(losses)


# The head by the ending of a transformers class name; models of any other class keep their own loss.
_HEADS: tuple[tuple[str, Callable[..., tuple[Tensor, Tensor]]], ...] = (
    ("ForConditionalGeneration", _aligned_loss),
    ("ForMaskedLM", _aligned_loss),
    ("ForTokenClassification", _aligned_loss),
    ("ForSequenceClassification", _class_loss),
    ("ForCausalLM", _causal_loss),
    ("LMHeadModel", _causal_loss),
)
# The names by which runs record the head, see LossModule.form.
_FORMS = {_causal_loss: "causal", _aligned_loss: "aligned", _class_loss: "classes"}


def _is_prompted(model: nn.Module) -> bool:
    """Whether peft puts virtual tokens in front of the model's input."""
    config: Any = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _weighs_tokens(model: nn.Module) -> bool:
    """Whether the model is adapted by a context-aware prompt (CPT), whose loss depends on the types of the tokens."""
    config: Any = getattr(model, "active_peft_config", None)
    return _is_prompted(model) and config.peft_type.value == "CPT"


def _find_head(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    inner = _without_adapters(model)
    if not hasattr(inner, "config") or _weighs_tokens(model):
        return None
    names = [base.__name__ for base in type(inner).__mro__]
    head = next((head for name in names for ending, head in _HEADS if name.endswith(ending)), None)
    if head is _aligned_loss and _is_prompted(model):
        return None
    if head is _aligned_loss and any(n.endswith("ForConditionalGeneration") for n in names):
        return _aligned_loss if getattr(inner.config, "is_encoder_decoder", False) else _causal_loss
    return head


def find_invalid_labels(labels: Tensor, classes: int) -> Tensor:
    """Find the labels that are neither a class nor ignored: bool, in the shape of ``labels``."""
    return ((labels < 0) & (labels != IGNORED)) | (labels >= classes)


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


# --- comparing the model's own loss with that of its head ----------------------------------------------------------

# The inputs of transformers models apart from labels. Any other input of a custom model may be part of its loss.
_INPUTS = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values", "labels"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
}
PROBE_ROWS = 8  # rows of a probe: the class that all probes share, and seven others
# With more classes than this, probes would cost more than a first step; the model then keeps its own loss.
MOST_CLASSES = 1024


def _is_transformers_own(model: nn.Module) -> bool:
    """Whether only transformers' code computes the loss: an original class, without hooks or replaced methods."""
    inner = _without_adapters(model)
    places = (type(inner).__module__, getattr(type(inner).forward, "__module__", ""))
    replaced = {"forward", "loss_function", "_loss_function"} & {*vars(inner), *inner._modules}
    hooked = bool(inner._forward_hooks)
    return all(place.startswith("transformers.models.") for place in places) and not replaced and not hooked


def _without_adapters(model: nn.Module) -> Any:
    """The model inside a peft model, which computes the loss."""
    inner: Any = model
    while type(inner).__name__.startswith("PeftModel") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def _take_rows(batch: Batch, count: int) -> Batch:
    return {name: v[:count] if isinstance(v, Tensor) and v.ndim else v for name, v in batch.items()}


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
        self.head = None if loss_fn is not None else _find_head(model)

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
        if _weighs_tokens(self.model):  # peft writes to these
            batch = {n: v.clone() if n == "input_type_mask" else v for n, v in batch.items()}
        output = self._call(batch)
        if isinstance(output, tuple):  # a model that is not of the library returns its loss first
            loss = next(iter(output), None)
        else:
            loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if loss is None:
            raise ZOError(
                "the model returned no loss: put 'labels' into the batch, or give loss_fn=(lambda model, batch: ...)"
            )
        return self._as_rows(loss, batch)

    def _call(self, batch: Batch) -> Any:
        try:
            return self.model(**batch)
        except TypeError as error:
            if _accepts(self.model, batch):
                raise
            raise ZOError(
                f"the model cannot be called with this batch ({first_line(error)}): give "
                "loss_fn=(lambda model, batch: ...), which calls it in its own way"
            ) from error

    @property
    def form(self) -> str:
        """The kind of loss that a run records: ``"own"``, ``"given"``, ``"unsettled"`` or a head's name."""
        if self.loss_fn is not None:
            return "given"
        if not self.settled:
            return "unsettled"
        return "own" if self.head is None else _FORMS[self.head]

    @property
    def classes(self) -> int | None:
        """The number of classes, whose labels count from 0; None unless the loss is that of a known head."""
        config = getattr(self.model, "config", None)
        if self.head is None or config is None:
            return None
        kinds = [base.__name__ for base in type(self.model).__mro__]
        if self.head is _class_loss or any(kind.endswith("ForTokenClassification") for kind in kinds):
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
            self.head = None if form == "own" else _find_head(self.model)

    def _logits(self, batch: Batch) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        config = getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            if "decoder_input_ids" not in inputs:
                inputs["decoder_input_ids"] = shift_labels_right(batch["labels"], config)
            return self.model(**inputs, use_cache=False)
        if hasattr(config, "use_cache"):
            inputs["use_cache"] = False
        return self.model(**inputs)

    def weigh(self, loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a batch's mean loss as sums and weights, as :meth:`forward` does."""
        return self._as_rows(loss, batch)

    def _as_rows(self, loss: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Convert a loss to (sums, weights). Per-example losses have weight 1; a 0-d mean has the weight of what it
        averages: the label tokens (without the first of each row in a causal model), or else the examples.
        """
        if not isinstance(loss, Tensor) or not loss.is_floating_point() or loss.ndim > 1:
            kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ZOError(f"the loss must be a floating-point tensor, 0-d or one value per example, not {kind}")
        loss = loss.float()
        if loss.ndim == 1:
            return loss, torch.ones_like(loss)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            if _find_head(self.model) is _causal_loss:
                labels = labels[:, 1:]
            weight = (labels != IGNORED).sum().float().reshape(1)
        else:
            rows = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
            weight = torch.ones(1, device=loss.device) * rows
        return loss.reshape(1) * weight, weight

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Decide between our loss from the logits and the model's own, on the first batch with usable labels.

        A model may add a regulariser, weigh classes, or smooth or shift labels in its own way. Both losses are compared
        on the batch's own labels and, unless transformers itself computes the loss, on labels made to distinguish them
        (:func:`make_probes`): a class weight shows only next to another class. If the probes cannot tell, the model
        keeps its own loss. If its own loss cannot be computed (it needs values that the batch lacks), ours is used.
        """
        if self.settled or (self.head is not None and "labels" not in batch):
            return
        self.settled = self.head is None or self._compare(batch)

    def _compare(self, batch: Batch) -> bool:
        """Drop our loss if the model's own differs, or might differ on other labels.

        Returns:
            Whether the batch could decide: one without any label has no loss to compare.
        """
        labels = batch["labels"]
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == IGNORED).all()):
            return False
        with evaluation_mode(self):
            few = _take_rows(batch, 2)
            if isinstance(labels, Tensor) and labels.ndim and bool((few["labels"] == IGNORED).all()):
                few = batch
            same = self._agrees(few)
            if same and not _is_transformers_own(self.model):
                if any(isinstance(value, Tensor) and name not in _INPUTS for name, value in batch.items()):
                    same = False  # row weights, for example, which later batches may set differently
                names = [base.__name__ for base in type(_without_adapters(self.model)).__mro__]
                tokens = not any(name.endswith("ForTokenClassification") for name in names)
                tried = make_probes(batch, getattr(self.model, "config", None), labels_are_tokens=tokens)
                found = [self._agrees(probe, distinct_rows=True) for probe in tried]
                same = same and bool(found) and all(found)
        if same is False:
            self.head = None
        return True

    def _agrees(self, batch: Batch, distinct_rows: bool = False) -> bool | None:
        """Whether the model's own loss of a batch equals ours; None if its own cannot be computed.

        Args:
            distinct_rows: the rows' losses must differ, so that a mean with other weights would be another number.
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
        # A 16-bit model computes its own loss from rounded numbers; in float32 both agree up to rounding.
        rtol = 1e-4 if all(p.dtype == torch.float32 for p in self.model.parameters()) else 2e-2
        each = sums / weights.clamp(min=1)
        if distinct_rows and not (each.max() - each.min()) > 10 * rtol * ours.abs():
            return False
        return torch.allclose(ours, own.float(), rtol=rtol, atol=1e-6, equal_nan=True)


def _accepts(model: nn.Module, batch: Batch) -> bool:
    """Whether the names in a batch are arguments of the model's forward, and all that it needs."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True


def shift_labels_right(labels: Tensor, config: Any) -> Tensor:
    """Make the decoder inputs of an encoder–decoder from its labels: start token first, ``-100`` becomes padding."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    start = pad if start is None else start
    first = torch.full_like(labels[:, :1], start)
    return torch.cat((first, torch.where(labels == IGNORED, pad, labels)[:, :-1]), dim=1)
