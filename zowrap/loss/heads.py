"""Compute the losses of known heads from their logits, row by row and in float32; say which labels they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError

Batch = dict[str, Any]
Head = Callable[[Any, Batch, nn.Module], tuple[Tensor, Tensor]]
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


def causal_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss of a language model: each position predicts the label after it."""
    return token_losses(output.logits[:, :-1], batch["labels"][:, 1:])


def prompted_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss of a language model behind virtual tokens, the last of which predicts the first label."""
    prompted: Any = model
    virtual = prompted.active_peft_config.num_virtual_tokens
    return token_losses(output.logits[:, virtual - 1 : -1], batch["labels"])


def aligned_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss of a model that predicts the label at each position."""
    return token_losses(output.logits, batch["labels"])


def class_loss(output: Any, batch: Batch, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss of a classifier of rows, of the kind that :func:`find_problem` names."""
    logits, labels = output.logits.float(), batch["labels"]
    problem = find_problem(without_adapters(model).config, labels)
    if problem == "single_label_classification":
        return token_losses(logits.unsqueeze(1), labels.reshape(-1, 1))
    if problem == "multi_label_classification":
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
    else:
        losses = (logits.reshape(labels.shape) - labels.float()).square().reshape(labels.shape[0], -1).mean(-1)
    return losses, torch.ones_like(losses)


# The head by the ending of a transformers class name; models of any other class keep their own loss.
_HEADS: tuple[tuple[str, Head], ...] = (
    ("ForConditionalGeneration", aligned_loss),
    ("ForMaskedLM", aligned_loss),
    ("ForTokenClassification", aligned_loss),
    ("ForSequenceClassification", class_loss),
    ("ForCausalLM", causal_loss),
    ("LMHeadModel", causal_loss),
)
# The names by which runs record the head, see zowrap.loss.module.LossModule.form.
FORMS: dict[Head, str] = {
    causal_loss: "causal",
    prompted_loss: "causal",
    aligned_loss: "aligned",
    class_loss: "classes",
}
_CLASSIFIERS = tuple(f"For{kind}Classification" for kind in ("Sequence", "Image", "Video", "Audio"))


def find_head(model: nn.Module) -> Head | None:
    """The loss that belongs to the head of a transformers model, or None where it is not a known one."""
    inner = without_adapters(model)
    if not hasattr(inner, "config") or weighs_tokens(model):
        return None
    names = names_of_kind(inner)
    head = next((head for name in names for ending, head in _HEADS if name.endswith(ending)), None)
    if head is aligned_loss and any(n.endswith("ForConditionalGeneration") for n in names):
        head = aligned_loss if getattr(inner.config, "is_encoder_decoder", False) else causal_loss
    if has_virtual_tokens(model):
        if head is aligned_loss:
            return None  # peft itself knows which positions the virtual tokens take
        return prompted_loss if head is causal_loss else head
    return head


def without_adapters(model: nn.Module) -> Any:
    """The model inside a peft model, which computes the loss."""
    inner: Any = model
    while type(inner).__name__.startswith("PeftModel") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether a peft model puts tokens of its own before the text, for which there are no labels."""
    config = getattr(model, "active_peft_config", None) if type(model).__name__.startswith("PeftModel") else None
    return bool(getattr(config, "is_prompt_learning", False)) and getattr(config, "peft_type", "") != "PREFIX_TUNING"


def weighs_tokens(model: nn.Module) -> bool:
    """Whether a context-aware prompt (CPT) adapts the model: its loss depends on the types of the tokens."""
    return has_virtual_tokens(model) and getattr(model.active_peft_config, "peft_type", "") == "CPT"  # type: ignore[union-attr]


def pad_for_prompt(labels: Tensor, logits: Tensor) -> Tensor:
    """Pad label tokens ``[rows, positions]`` on the left to the positions of ``logits``, which are more with a prompt.

    The last of peft's virtual tokens predicts the first label.
    """
    more = logits.shape[1] - labels.shape[1]
    return nn.functional.pad(labels, (more, 0), value=IGNORED) if more > 0 else labels


def names_of_kind(model: nn.Module) -> list[str]:
    """The names of a model's class and of the classes that it derives from."""
    return [base.__name__ for base in type(model).__mro__]


def find_problem(config: Any, labels: Tensor) -> str:
    """The kind of a classifier's loss, by transformers' names.

    As transformers chooses it where the configuration says nothing, except that labels with a column for each class
    are several labels at once whatever their dtype.
    """
    if problem := getattr(config, "problem_type", None):
        return problem
    classes = getattr(config, "num_labels", None)
    if classes == 1:
        return "regression"
    several = labels.ndim == 2 and labels.shape[1] == classes
    return "multi_label_classification" if several else "single_label_classification"


def convert_labels(batch: Batch, model: nn.Module) -> Batch:
    """Convert the labels of a transformers model to the dtype that its loss takes; other batches stay as they are.

    Token ids and classes become int64, the numbers of a regression and of several labels at once floats.

    Raises:
        ZOError: a classifier of rows cannot take labels of this kind or shape.
    """
    labels, inner = batch.get("labels"), without_adapters(model)
    if not isinstance(labels, Tensor) or not hasattr(inner, "config"):
        return batch
    if labels.ndim and any(name.endswith(_CLASSIFIERS) for name in names_of_kind(inner)):
        wanted = _class_labels(labels, inner.config)
    else:
        wanted = labels if labels.is_floating_point() or labels.dtype == torch.bool else labels.to(torch.int64)
    return batch if wanted is labels else {**batch, "labels": wanted}


def _class_labels(labels: Tensor, config: Any) -> Tensor:
    """Labels of a classifier of rows, see :func:`convert_labels`."""
    classes = getattr(config, "num_labels", None)
    problem, given = find_problem(config, labels), f"labels are {_describe(labels)}"
    if problem == "regression":
        return labels if labels.is_floating_point() else labels.float()
    if problem == "multi_label_classification":
        if labels.ndim != 2 or labels.shape[1] != classes:
            raise ZOError(
                f"the {given}, but this model gives several labels at once: they must be [rows, {classes}], with a 1 "
                f"for each class that a row has and a 0 for each other"
            )
        return labels if labels.is_floating_point() else labels.float()
    if labels.is_floating_point():
        raise ZOError(
            f"the {given}, but this model has {classes} classes: give whole numbers (labels.long()), or set "
            f"model.config.problem_type to what they are ('regression', 'multi_label_classification')"
        )
    if labels.ndim > 1 and labels.shape[1:].numel() != 1:
        raise ZOError(f"the {given}, but this model gives each row one of {classes} classes: they must be [rows]")
    return labels.to(torch.int64)


def _describe(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"


def find_invalid_labels(labels: Tensor, classes: int) -> Tensor:
    """Find the labels that are neither a class nor ignored: bool, in the shape of ``labels``."""
    return ((labels < 0) & (labels != IGNORED)) | (labels >= classes)


def shift_labels_right(labels: Tensor, config: Any) -> Tensor:
    """Make the decoder inputs of an encoder–decoder from its labels: start token first, ``-100`` becomes padding."""
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    pad = 0 if pad is None else pad
    start = pad if start is None else start
    first = torch.full_like(labels[:, :1], start)
    return torch.cat((first, torch.where(labels == IGNORED, pad, labels)[:, :-1]), dim=1)
