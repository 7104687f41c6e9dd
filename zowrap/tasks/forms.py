"""Define four forms of classification, each a module that returns ``loss`` and ``logits`` ``[batch, labels]``.

=========  =====================================  ==========================================================
form       for                                    score of label c
=========  =====================================  ==========================================================
sequence   a classification head                  the head's logit
words      causal language models                 log-likelihood of the label's words after the text
sentence   sentence encoders                      20 · cosine(embedding of the text, embedding of c's name)
vectors    sentence encoders                      20 · cosine(embedding of the text, a vector of c's own)
=========  =====================================  ==========================================================

The modules are simple enough for ``torch.export`` with dynamic batch size and length: the labels' token ids are
buffers, and every shape comes from a tensor. The model inside is the attribute ``module``, which canonical parameter
names leave out, so noise and journal are the same as for the bare model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from zowrap.storage.safetensors import LABEL_VECTORS
from zowrap.tasks.encoder_modules import EncoderModules

# Cosines are between -1 and 1; 20 is the inverse temperature that sentence encoders are trained with.
COSINE_SCALE = 20.0


class Form(nn.Module):
    """Base class of the forms.

    ``forward(input_ids, attention_mask, labels=None)``, int64 ``[batch, length]`` twice and ``[batch]``, returns the
    mean cross-entropy in float32 and logits, float32 ``[batch, labels]``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @property
    def config(self) -> Any:
        return self.module.config

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits: float32 ``[batch, labels]``."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = self.scores(input_ids, attention_mask, **types)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _call(self, **inputs: Any) -> Any:
        """Call the model inside, without a cache of keys and values."""
        if hasattr(self.module.config, "use_cache"):
            inputs["use_cache"] = False
        return self.module(**inputs)


def _list_inputs(module: nn.Module) -> set[str]:
    """The names of what a model's forward takes; those of one of peft's wrappers are its base's."""
    inner: Any = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    return set(inspect.signature(inner.forward).parameters)


class LabelTokens(nn.Module):
    """The labels' token ids and their mask, int64 ``[labels, tokens]``: constants that move with the model's device.

    They are a module without saved state, so that a form is saved as the model inside.
    """

    ids: Tensor
    mask: Tensor

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)


class SequenceForm(Form):
    """A model with a classification head, scored by its own logits.

    Rows may come with ``token_type_ids``, int64 ``[batch, length]``, which are handed on if the model takes them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._takes_types = "token_type_ids" in _list_inputs(module)

    def scores(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {"token_type_ids": token_type_ids} if self._takes_types and token_type_ids is not None else {}
        return self._call(input_ids=input_ids, attention_mask=attention_mask, **types).logits.float()


class WordsForm(Form):
    """A causal language model, scored by the log-likelihood of each label's words after the text.

    Batches are padded on the left, so every text ends at the last position. If each label is one token, one forward of
    the batch gives all scores; otherwise every text is continued with every label (batch · labels rows).

    Args:
        module: the language model.
        label_ids: int64 ``[labels, words]``, padded on the right.
        label_mask: int64 ``[labels, words]``, 0 at padding.
    """

    def __init__(self, module: nn.Module, label_ids: Tensor, label_mask: Tensor) -> None:
        super().__init__(module)
        self.names = LabelTokens(label_ids, label_mask)
        accepted = _list_inputs(module)
        self._positions = "position_ids" in accepted
        self._keeps = "logits_to_keep" in accepted

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.names.ids.shape[1] == 1:
            last = self._logits(input_ids, attention_mask, keep=1)[:, -1]
            return last.log_softmax(-1).index_select(1, self.names.ids[:, 0])
        return self._continued(input_ids, attention_mask)

    def _continued(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows, length = input_ids.shape
        labels, words = self.names.ids.shape
        ids = _pair_rows(input_ids, self.names.ids).reshape(rows * labels, length + words)
        mask = _pair_rows(attention_mask, self.names.mask).reshape(rows * labels, length + words)
        logits = self._logits(ids, mask, keep=words + 1)[:, -words - 1 : -1]
        wanted = ids[:, length:].unsqueeze(-1)
        likelihood = logits.log_softmax(-1).gather(-1, wanted).squeeze(-1)  # [rows · labels, words]
        return (likelihood * mask[:, length:]).sum(-1).reshape(rows, labels)

    def _logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        extra: dict[str, Any] = {}
        if self._positions:  # counted from the first real token, whatever the padding
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        if self._keeps:  # the head over a large vocabulary is needed at the last positions only
            extra["logits_to_keep"] = keep
        return self._call(input_ids=ids, attention_mask=mask, **extra).logits[:, -keep:].float()


def _pair_rows(left: Tensor, right: Tensor) -> Tensor:
    """Continue each row with each label: ``[rows, n]`` and ``[labels, m]`` → ``[rows, labels, n + m]``."""
    rows, labels = left.shape[0], right.shape[0]
    return torch.cat(
        (
            left.unsqueeze(1).expand(rows, labels, left.shape[1]),
            right.unsqueeze(0).expand(rows, labels, right.shape[1]).to(left.dtype),
        ),
        dim=2,
    )


class SentenceForm(Form):
    """A sentence encoder, scored by 20 · cosine between the embeddings of the text and of each label's name.

    The names go through the same weights as the text, so both move when the weights do. An embedding is what the
    modules after the transformer make of its last hidden state, normalised.

    Args:
        module: the transformer.
        label_ids: int64 ``[labels, tokens]``, the names' token ids.
        label_mask: int64 ``[labels, tokens]``.
        after: the modules that follow it.
    """

    def __init__(self, module: nn.Module, label_ids: Tensor, label_mask: Tensor, after: EncoderModules) -> None:
        super().__init__(module)
        self.names = LabelTokens(label_ids, label_mask)
        self.after = after

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        names = self.embed(self.names.ids, self.names.mask)
        return COSINE_SCALE * self.embed(input_ids, attention_mask) @ names.T

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts as unit vectors: float32 ``[rows, width]``."""
        hidden = self._call(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        return F.normalize(self.after(hidden, attention_mask), dim=-1)


class LabelVectors(nn.Module):
    """One vector per label, float32 ``[labels, width]``, saved in a separate file in the model's folder.

    Attributes:
        separate_file: the name of that file.
        facts: strings for its header; ``labels`` holds the names in order, as JSON.
    """

    separate_file = LABEL_VECTORS

    def __init__(self, start: Tensor, labels: Sequence[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        self.facts = {"labels": json.dumps(list(labels), ensure_ascii=False)}


class VectorsForm(SentenceForm):
    """A frozen sentence encoder with one tunable vector per label, which starts as the embedding of its name.

    Untuned, it scores as :class:`SentenceForm` does. The loss is nearly that of a logistic regression on the encoder's
    embeddings. A step perturbs only what comes after the encoder, so all its directions share one forward of it.

    Args:
        labels: the names.
        vectors: float32 ``[labels, width]`` to continue from; by default the embeddings of the names.
    """

    def __init__(
        self,
        module: nn.Module,
        label_ids: Tensor,
        label_mask: Tensor,
        after: EncoderModules,
        labels: Sequence[str],
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__(module, label_ids, label_mask, after)
        device = next(module.parameters()).device
        with torch.no_grad():
            start = self.embed(label_ids.to(device), label_mask.to(device)) if vectors is None else vectors
        self.vectors = LabelVectors(start.clone(), labels)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        names = F.normalize(self.vectors.weight, dim=-1)
        return COSINE_SCALE * self.embed(input_ids, attention_mask) @ names.T


def per_example_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Cross-entropy of each example, float32 ``[batch]``: the ``loss_fn`` of a classification run."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    output = model(**inputs)
    return F.cross_entropy(output.logits, batch["labels"], reduction="none")
