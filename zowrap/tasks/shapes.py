"""Build the model and a batch of a task on the ``meta`` device, without loading weights or reading data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zowrap.errors import ZOError
from zowrap.loss.module import token_losses
from zowrap.tasks.classification import TEMPLATES, Classification, choose_form
from zowrap.tasks.encoder import default_pooling
from zowrap.tasks.lm import LanguageModelling
from zowrap.tasks.loading import Source, load_model


@dataclass
class Shapes:
    """The arguments of ``zo_wrap``, without values.

    Attributes:
        batch: inputs and labels as the task makes them, int64 ``[rows, length]``; None if the model has no loss.
        trainable: the task's default for ``trainable``.
        why_not: the reason why ``batch`` is None.
    """

    model: nn.Module
    batch: dict[str, Tensor] | None
    loss_fn: Any = None
    trainable: list[str] | None = None
    why_not: str | None = None


def build_shapes(
    source: Source,
    dtype: torch.dtype,
    kind: str | None,
    rows: int,
    length: int,
    head: str = "auto",
    labels: Sequence[str] | None = None,
) -> Shapes:
    """Build the model for a task and a batch of ``rows`` by ``length`` tokens.

    Args:
        source: opened with ``empty``.
        kind: a task; None builds the class that the configuration names, with its own loss.
        head, labels: of a classification.

    Raises:
        ZOError: the task does not fit the model, or needs something that is missing (the message says what).
    """
    if kind is None:
        return _build_own_class(source, dtype, rows, length)
    if kind == "lm":
        lm = LanguageModelling("text", "text", length)
        return Shapes(lm.build(source, dtype), _make_batch(rows, length, per_token=True))
    form, _ = choose_form(source, head)
    names = list(labels or [])
    if not names and form == "sequence":
        names = [str(name) for name in (getattr(source.config, "id2label", None) or {}).values()]
    if not names:
        raise ZOError("the size of this form of classification depends on its labels: name them with --labels a,b,c")
    if form != "sequence" and source.tokenizer is None:
        raise ZOError(f"{source.name} has no tokenizer, which this form of classification needs for label names")
    pooling = default_pooling(source.config)
    task = Classification(form, names, TEMPLATES[form], "text", "label", length, pooling)
    model = task.build(source, dtype).to("meta")
    if form == "words":
        length -= task.label_words(source)[0].shape[1]
        if length < 1:
            raise ZOError("--max-length leaves no room for the text before the label's words")
    return Shapes(model, _make_batch(rows, length), _loss, task.default_trainable(model))


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same as ``task.loss_fn``; torch loses the shape of its own cross-entropy for varying sizes on ``meta``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_losses(logits.unsqueeze(1), batch["labels"].unsqueeze(1))[0]


def _build_own_class(source: Source, dtype: torch.dtype, rows: int, length: int) -> Shapes:
    """Build the class that the configuration names, with its own loss."""
    import transformers

    name = next((n for n in source.architectures if hasattr(transformers, n)), None)
    if name is None and not getattr(source.config, "auto_map", None):
        raise ZOError(f"{source.name} names no architecture that transformers knows")
    model = load_model(source, getattr(transformers, name) if name else transformers.AutoModel, dtype)
    batch = _make_batch(rows, length)
    kind = type(model).__name__
    if kind.endswith("ForSequenceClassification"):
        classes = getattr(model.config, "num_labels", 2)
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            batch["labels"] = torch.zeros(rows, classes, device="meta")
        elif classes == 1:
            batch["labels"] = torch.zeros(rows, device="meta")
        return Shapes(model, batch)
    if kind.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")
    ):
        return Shapes(model, _make_batch(rows, length, per_token=True))
    return Shapes(model, None, why_not=f"{kind} has no loss of its own: name what to tune it for with --task")


def _make_batch(rows: int, length: int, per_token: bool = False) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    labels = ids if per_token else torch.zeros(rows, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.clone()}
